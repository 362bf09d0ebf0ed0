"""Shared adapters against their formula."""

from __future__ import annotations

import pytest
import torch
from encoders import IMAGES, config, image_encoder
from torch.nn import functional as F
from tuned import encoder, from_page, shake, trained_names
from world import TinyBackbone, TinyStream

from clplatform.types import ClplatformError


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_is_the_bare_model_with_adapters_after_its_blocks(kind: str) -> None:
    backbone, batch = encoder(kind, "adapter")
    shake(backbone)
    bare, _ = encoder(kind)
    for block, plain in zip(backbone.blocks()[1:], bare.blocks()[1:], strict=True):
        (a,) = block.adapters

        def adapt(module, args, output, a=a):  # type: ignore[no-untyped-def]
            norm = F.layer_norm(output, (16,), a.norm.weight, a.norm.bias)
            return output + (norm @ a.down.weight.T).relu() @ a.up.weight.T

        plain.register_forward_hook(adapt)
    torch.testing.assert_close(backbone(batch), bare(batch), rtol=1e-4, atol=1e-5)


def test_parameters() -> None:
    backbone, _ = encoder("vit", "adapter", bottleneck=5)
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 3 * 2 * 16 * (5 + 1)
    assert all(".adapters.0." in n for n in trained_names(backbone))


def test_refuses_what_has_no_blocks_of_one_size() -> None:
    with pytest.raises(ClplatformError, match="tuning=adapter finds no blocks in this backbone: choose a Transformer"):
        from_page("adapter").apply(TinyBackbone(), TinyStream().info.input)
    swin = image_encoder("swin", config=config("swin", image_size=32, patch_size=1), pooling="mean")
    with pytest.raises(ClplatformError, match=r"gives \d+ features and the backbone \d+: adapters need"):
        from_page("adapter").apply(swin, IMAGES)
