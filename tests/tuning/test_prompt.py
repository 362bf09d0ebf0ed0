"""Shared prompts against the tiny ViT written out, and against prompts that last as long as a context."""

from __future__ import annotations

import pytest
import torch
from encoders import TEXTS, text_encoder
from prompted import livelier, read
from tuned import encoder, from_page, shake, trained_names
from world import DIM, TinyBackbone, TinyStream, tiny_vit

from clplatform.module.prompt import soft_prompts
from clplatform.types import ClplatformError


@torch.no_grad()
def test_tokens_stand_behind_the_first_and_are_taken_out_again() -> None:
    backbone = livelier(tiny_vit()).eval()
    from_page("prompt").apply(backbone, TinyStream().info.input)
    shake(backbone)
    x = torch.randn(3, 1, 1, DIM, generator=torch.Generator().manual_seed(2))
    found = backbone({"pixel_values": x})
    tokens = backbone.model.embeddings.soft_prompt
    assert tokens.shape == (3, 16)
    for i in range(3):
        torch.testing.assert_close(found[i], read(backbone_without(backbone), x[i], tokens)[0], rtol=1e-4, atol=1e-5)


def backbone_without(backbone: torch.nn.Module) -> torch.nn.Module:
    """The same weights without prompts."""
    bare = tiny_vit().eval()
    state = {n: t for n, t in backbone.state_dict().items() if not n.endswith("soft_prompt")}
    bare.load_state_dict(state)
    return bare


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "bert", "distilbert"])
def test_is_the_bare_model_with_prompts_in_a_context(kind: str) -> None:
    backbone, batch = encoder(kind, "prompt")
    shake(backbone)
    bare, _ = encoder(kind)
    with soft_prompts(bare, backbone.model.embeddings.soft_prompt):
        expected = bare(batch)
    assert torch.equal(backbone(batch), expected)
    assert trained_names(backbone) == {"model.embeddings.soft_prompt"}


def test_refuses_what_does_not_take_them() -> None:
    with pytest.raises(
        ClplatformError, match="tuning=prompt cannot give soft prompts to this backbone: it is no Hugging"
    ):
        from_page("prompt").apply(TinyBackbone(), TinyStream().info.input)
    with pytest.raises(ClplatformError, match="its attention is causal"):
        from_page("prompt").apply(text_encoder("gpt2"), TEXTS)
