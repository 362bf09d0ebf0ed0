"""The cosine head against its formula, written out."""

from __future__ import annotations

import math

import pytest
import torch
from heads import filled, grown, info

from clplatform.head.cosine import CosineHead


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_scaled_cosines_of_features_and_class_weights() -> None:
    head, x = filled(CosineHead(feature_size=5, scale=10.0), 3), torch.randn(4, 5)
    found = head(x, torch.tensor([0, 1, 0, 2]))
    expected = [[head.scale.item() * cosine(f, w) for w in head.weight.tolist()] for f in x.tolist()]
    assert found.tolist() == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in expected]


def test_norms_have_no_say() -> None:
    head, x = grown(CosineHead(feature_size=5, scale=10.0), 3), torch.randn(4, 5)
    task = torch.zeros(4, dtype=torch.int64)
    before = head(x, task)
    with torch.no_grad():
        head.weight[1] *= 100
    torch.testing.assert_close(head(x * 0.01, task), before)
    assert head(torch.zeros(1, 5), task[:1]).tolist() == [[0.0] * 3]  # and a vector of zeros has no direction


def test_the_scale_starts_as_set_and_is_learned() -> None:
    head = grown(CosineHead(feature_size=5, scale=7.5), 2)
    assert head.scale.item() == 7.5
    x = torch.randn(4, 5)
    head(x, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert head.scale.grad is not None and head.scale.grad != 0
    assert head.weight.grad is not None and head.weight.grad.any()
    scale = head.scale
    head.grow(info(1, (2,), 3))
    assert head.scale is scale
