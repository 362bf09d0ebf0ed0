"""LoRA and DoRA against PEFT applied by hand, and against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel
from tuned import encoder, from_page, shake, trained_names
from world import TinyBackbone, TinyStream

from clplatform.module import lora


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 asks for it
@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_is_peft_s_own_model(name: str, kind: str) -> None:
    backbone, batch = encoder(kind, name, alpha=6.0)
    bare, _ = encoder(kind)
    shake(backbone)
    plain = AutoModel.from_config(bare.config, attn_implementation="sdpa")
    plain.load_state_dict(bare.model.state_dict(), strict=False)
    layers = ["q_proj", "v_proj"] if kind == "vit" else ["query", "value"]
    settings: Any = {"r": 2, "lora_alpha": 6, "target_modules": layers, "use_dora": name == "dora"}
    reference = get_peft_model(plain, LoraConfig(**settings)).eval()
    own = {n.removeprefix("model."): t for n, t in backbone.state_dict().items() if "lora_" in n}
    renamed = {f"base_model.model.{n.replace('.shared', '.default')}": t for n, t in own.items()}
    assert renamed.keys() == {n for n in reference.state_dict() if "lora_" in n}
    reference.load_state_dict(renamed, strict=False)
    bare.model = reference
    torch.testing.assert_close(backbone(batch), bare(batch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_layer_computes_the_formula(name: str) -> None:
    backbone, _ = encoder("vit", name, alpha=6.0, targets="qkv")
    shake(backbone)
    layers = lora.named_layers(backbone)
    assert len(layers) == 3 * 3
    for layer in layers.values():
        x = torch.randn(4, 16)
        base, a, b = layer.get_base_layer(), layer.lora_A["shared"].weight, layer.lora_B["shared"].weight
        changed = base.weight + 6 / 2 * b @ a
        if name == "dora":
            changed = (
                layer.lora_magnitude_vector["shared"].weight[:, None] * changed / changed.norm(dim=1, keepdim=True)
            )
        expected = F.linear(x, changed, base.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, base(x), atol=1e-2)


@pytest.mark.parametrize(("targets", "n"), [("q", 1), ("v", 1), ("qv", 2), ("qkv", 3), ("all", 6)])
def test_targets(targets: str, n: int) -> None:
    backbone, _ = encoder("vit", "lora", targets=targets)
    assert len(lora.layers(backbone)) == 3 * n
    assert len(trained_names(backbone)) == 2 * 3 * n


def test_dropout_acts_in_training_only() -> None:
    backbone, batch = encoder("vit", "lora", dropout=0.5)
    shake(backbone)
    out: list[Tensor] = [backbone(batch) for _ in range(2)]
    assert torch.equal(*out)
    backbone.train()
    assert not torch.equal(backbone(batch), backbone(batch))


def test_a_backbone_without_attention_has_all_linear_layers_adapted() -> None:
    backbone = TinyBackbone()
    from_page("lora").apply(backbone, TinyStream().info.input)
    assert trained_names(backbone) == {"layer.lora_A.shared.weight", "layer.lora_B.shared.weight"}
