"""The proxy classifier and its loss, one class, one proxy and one sample at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clplatform.module.proxies import LocalSimilarity, k_means, nca_loss


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum().sqrt()


@torch.no_grad()
def test_logits_are_the_written_out_ones() -> None:
    torch.manual_seed(0)
    classifier, features = LocalSimilarity(feature_size=5, n_proxies=3, scale=4.0), torch.randn(6, 5)
    classifier.grow(2)
    classifier.grow(4)
    found = classifier(features)
    assert found.shape == (6, 4)
    for b in range(6):
        for c in range(4):
            cosines = [float(unit(classifier.weight[c, 5 * k : 5 * k + 5]) @ unit(features[b])) for k in range(3)]
            total = sum(math.exp(x) for x in cosines)
            assert float(found[b, c]) == pytest.approx(4 * sum(math.exp(x) / total * x for x in cosines), abs=1e-5)


def test_growing_keeps_what_was_there() -> None:
    classifier = LocalSimilarity(feature_size=5, n_proxies=3, scale=1.0)
    classifier.grow(2)
    before = classifier.weight.detach().clone()
    classifier.grow(2)
    assert torch.equal(classifier.weight, before)
    classifier.grow(3)
    assert torch.equal(classifier.weight[:2], before)
    assert classifier.weight.shape == (3, 15)


def test_the_loss_is_the_written_out_one() -> None:
    torch.manual_seed(0)
    cosines, labels, eta, margin = 2 * torch.rand(8, 4) - 1, torch.arange(8) % 4, 3.0, 0.6
    cosines[0, 0] = 5.0  # far beyond the margin: this sample has no loss
    expected = []
    for row, y in zip(cosines.tolist(), labels.tolist(), strict=True):
        others = sum(math.exp(eta * s) for i, s in enumerate(row) if i != y)
        expected.append(max(0.0, -math.log(math.exp(eta * (row[y] - margin)) / others)))
    assert expected[0] == 0 < expected[1]
    found = nca_loss(eta * cosines, labels, torch.tensor(eta), margin)
    assert float(found) == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_masked_classes_have_no_part_in_the_loss() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    masked = torch.cat([logits, torch.full((4, 3), -1e4)], 1)
    scale = torch.tensor(2.0)
    torch.testing.assert_close(nca_loss(masked, labels, scale, 0.1), nca_loss(logits, labels, scale, 0.1))


def test_imprinted_proxies_are_at_the_centers_of_clusters() -> None:
    """Three groups of directions that lie far apart; fewer samples than proxies leave the rest random."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(6)[:3]
    features = 7 * (directions.repeat_interleave(10, 0) + 0.05 * torch.randn(30, 6, generator=generator))
    hits = 0
    for seed in range(10):
        centers = k_means(torch.nn.functional.normalize(features, dim=1), 3, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(centers.norm(dim=1), torch.ones(3))
        hits += int(((centers @ directions.T) > 0.99).any(0).all())
    assert hits >= 2  # k-means finds what its start allows
    classifier = LocalSimilarity(feature_size=6, n_proxies=4, scale=1.0)
    classifier.grow(2)
    before = classifier.weight.detach().clone()
    classifier.imprint(1, features[:2], generator)
    assert torch.equal(classifier.weight[0], before[0])
    rows = classifier.weight[1].view(4, 6)
    assert torch.equal(rows[2:], before[1].view(4, 6)[2:])
    close = rows[:2] @ torch.nn.functional.normalize(features[:2], dim=1).T
    torch.testing.assert_close(close.max(1).values, torch.ones(2))
