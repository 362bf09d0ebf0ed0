"""Shared prefixes against the tiny ViT written out, and against prefixes that last as long as a context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import TEXTS, text_encoder
from prompted import livelier, read
from tuned import encoder, from_page, shake, trained_names
from world import DIM, TinyBackbone, TinyStream, tiny_vit

from clplatform.module.prompt import prefixes
from clplatform.types import ClplatformError


def held(backbone: Any) -> list[Any]:
    """Keys and values of each layer."""
    return [tuple(m.prefix) for m in backbone.modules() if hasattr(m, "prefix")]


@torch.no_grad()
def test_every_layer_attends_to_its_keys_and_values() -> None:
    backbone = livelier(tiny_vit()).eval()
    from_page("prefix").apply(backbone, TinyStream().info.input)
    shake(backbone)
    x = torch.randn(3, 1, 1, DIM, generator=torch.Generator().manual_seed(2))
    found, by_layer = backbone({"pixel_values": x}), dict(enumerate(held(backbone), 1))
    assert {number: (k.shape, v.shape) for number, (k, v) in by_layer.items()} == {1: ((2, 16),) * 2, 2: ((2, 16),) * 2}
    for i in range(3):
        torch.testing.assert_close(found[i], read(backbone, x[i], prefixes=by_layer)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "bert", "distilbert"])
def test_is_the_bare_model_with_prefixes_in_a_context(kind: str) -> None:
    backbone, batch = encoder(kind, "prefix")
    shake(backbone)
    bare, _ = encoder(kind)
    with prefixes(bare, dict(enumerate(held(backbone), 1))):
        expected = bare(batch)
    assert torch.equal(backbone(batch), expected)
    assert len(trained_names(backbone)) == 3 * 2


def test_refuses_what_does_not_take_them() -> None:
    with pytest.raises(ClplatformError, match="tuning=prefix cannot give prefixes to this backbone: it is no Hugging"):
        from_page("prefix").apply(TinyBackbone(), TinyStream().info.input)
    with pytest.raises(ClplatformError, match="does not find the keys of every layer in ModernBertModel"):
        from_page("prefix").apply(text_encoder("modernbert"), TEXTS)
