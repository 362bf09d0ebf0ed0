"""(IA)³ against its formula, by hooks on the bare model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import TEXTS, text_encoder
from peft.tuners.ia3 import IA3Layer
from tuned import encoder, from_page, shake, trained_names
from world import TinyBackbone, TinyStream

from clplatform.types import ClplatformError

# Keys and values, by which the output is scaled; and what the feed-forward network's second layer reads.
LAYERS = {
    "vit": (("attention.k_proj", "attention.v_proj"), "mlp.fc2"),
    "bert": (("attention.self.key", "attention.self.value"), "output.dense"),
    "distilbert": (("attention.k_lin", "attention.v_lin"), "ffn.lin2"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_scales_keys_values_and_inner_activations(kind: str) -> None:
    backbone, batch = encoder(kind, "ia3")
    shake(backbone)
    bare, _ = encoder(kind)
    outputs, inner = LAYERS[kind]
    n = 0
    for block, plain in zip(backbone.blocks()[1:], bare.blocks()[1:], strict=True):
        for name in outputs:
            scale = block.get_submodule(name).ia3_l["shared"]
            plain.get_submodule(name).register_forward_hook(lambda m, args, out, s=scale: out * s)
            n += scale.numel()
        scale = block.get_submodule(inner).ia3_l["shared"]
        plain.get_submodule(inner).register_forward_pre_hook(lambda m, args, s=scale: (args[0] * s,))
        n += scale.numel()
    torch.testing.assert_close(backbone(batch), bare(batch), rtol=1e-4, atol=1e-5)
    assert n == 3 * (16 + 16 + 24)
    assert n == sum(p.numel() for p in backbone.parameters() if p.requires_grad)


def test_starts_at_one_with_vectors() -> None:
    backbone, _ = encoder("bert", "ia3")
    scales: list[Any] = [m.ia3_l["shared"] for m in backbone.modules() if isinstance(m, IA3Layer)]
    assert len(scales) == len(trained_names(backbone)) == 9
    assert all(s.ndim == 1 and (s == 1).all() for s in scales)


def test_refuses_a_backbone_without_keys_and_values() -> None:
    with pytest.raises(ClplatformError, match="tuning=ia3 finds no keys and values in TinyBackbone: choose another"):
        from_page("ia3").apply(TinyBackbone(), TinyStream().info.input)
    with pytest.raises(ClplatformError, match="in ModernBertModel"):
        from_page("ia3").apply(text_encoder("modernbert"), TEXTS)
