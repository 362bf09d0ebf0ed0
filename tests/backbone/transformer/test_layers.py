"""Layers against PyTorch's own Transformer with the same weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.backbone.transformer.attention import causal_mask, padding_mask
from clplatform.backbone.transformer.config import ACTIVATIONS, LayerConfig, initialise
from clplatform.backbone.transformer.encoder import EncoderStack, final_norm
from clplatform.backbone.transformer.layers import DecoderLayer, FeedForward, Residual

D, N, F_, LAYERS = 16, 4, 24, 3
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def copy(ours: Any, theirs: Any) -> None:
    """A PyTorch layer's weights into ours."""
    pairs = [(ours.attention, theirs.self_attn)]
    norms = [ours.attention_residual, ours.feed_forward_residual]
    if hasattr(ours, "cross_attention"):
        pairs.append((ours.cross_attention, theirs.multihead_attn))
        norms.insert(1, ours.cross_attention_residual)
    for mine, his in pairs:
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            linear = getattr(mine, name)
            linear.weight.copy_(his.in_proj_weight.chunk(3)[i])
            linear.bias.copy_(his.in_proj_bias.chunk(3)[i])
        mine.out_proj.load_state_dict(his.out_proj.state_dict())
    for i, residual in enumerate(norms, 1):
        residual.norm.load_state_dict(getattr(theirs, f"norm{i}").state_dict())
    ours.feed_forward.expand.load_state_dict(theirs.linear1.state_dict())
    ours.feed_forward.contract.load_state_dict(theirs.linear2.state_dict())


def config(norm: Any, activation: Any) -> LayerConfig:
    return LayerConfig(size=D, n_heads=N, inner_size=F_, norm=norm, activation=activation, dropout=0.0, epsilon=1e-4)


def theirs(kind: Any, norm: str, activation: str) -> list[Any]:
    """PyTorch layers with weights that are all random."""
    torch.manual_seed(0)
    layers = [
        kind(D, N, F_, dropout=0.0, activation=activation, batch_first=True, norm_first=norm == "pre",
             layer_norm_eps=1e-4)
        for _ in range(LAYERS)
    ]  # fmt: skip
    with torch.no_grad():
        for layer in layers:
            for p in layer.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return layers


def same_with_gradients(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    for mine, his in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_an_encoder_is_pytorch_s(norm: str, activation: str) -> None:
    layers = theirs(nn.TransformerEncoderLayer, norm, activation)
    stack = EncoderStack(config(norm, activation), LAYERS)
    with torch.no_grad():
        for mine, his in zip(stack.layers, layers, strict=True):
            copy(mine, his)
        if norm == "pre":
            stack.norm.weight.add_(torch.randn(D))
    x = torch.randn(2, 6, D, requires_grad=True)
    expected = x
    for layer in layers:
        expected = layer(expected, src_key_padding_mask=MASK == 0)
    if norm == "pre":
        expected = F.layer_norm(expected, (D,), stack.norm.weight, stack.norm.bias, 1e-4)
    found = stack(x, padding_mask(MASK))
    real = MASK.bool()
    same_with_gradients(found[real], expected[real], [x])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_decoder_is_pytorch_s(norm: str, activation: str) -> None:
    layers = theirs(nn.TransformerDecoderLayer, norm, activation)
    x, memory = torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 6, D, requires_grad=True)
    found, expected = x, x
    for his in layers:
        mine = DecoderLayer(config(norm, activation), cross=True)
        with torch.no_grad():
            copy(mine, his)
        found = mine(found, memory, causal=True, memory_mask=padding_mask(MASK))
        masked = mine(found, memory, mask=causal_mask(5, 5, x.device), memory_mask=padding_mask(MASK))
        torch.testing.assert_close(masked, mine(found, memory, causal=True, memory_mask=padding_mask(MASK)))
        expected = his(
            expected, memory, tgt_mask=~causal_mask(5, 5, x.device), memory_key_padding_mask=MASK == 0
        )  # fmt: skip
    same_with_gradients(found, expected, [x, memory])


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_the_feed_forward_network_is_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    module, x = FeedForward(config("pre", activation)), torch.randn(2, 3, D)
    z = x @ module.expand.weight.T + module.expand.bias
    formulas = {
        "gelu": 0.5 * z * (1 + torch.erf(z / 2**0.5)),
        "gelu_new": 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "relu": z.clamp_min(0),
    }
    expected = formulas[activation] @ module.contract.weight.T + module.contract.bias
    torch.testing.assert_close(module(x), expected)
    assert set(formulas) == set(ACTIVATIONS)


@torch.no_grad()
def test_the_norm_is_before_the_sublayer_or_after_the_sum() -> None:
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    pre, post = Residual(config("pre", "gelu")), Residual(config("post", "gelu"))
    norm = lambda y: F.layer_norm(y, (D,), eps=1e-4)  # noqa: E731
    torch.testing.assert_close(pre(x, torch.sin), x + norm(x).sin())
    torch.testing.assert_close(post(x, torch.sin), norm(x + x.sin()))
    assert isinstance(final_norm(config("pre", "gelu")), nn.LayerNorm)
    assert isinstance(final_norm(config("post", "gelu")), nn.Identity)


@pytest.mark.parametrize("where", ["dropout", "activation_dropout"])
def test_dropout_acts_while_training_only(where: str) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {where: 0.5}
    stack = EncoderStack(LayerConfig(size=D, n_heads=N, inner_size=F_, **settings), 1)
    x = torch.randn(2, 3, D)
    assert not torch.equal(stack(x), stack(x))
    stack.eval()
    assert torch.equal(stack(x), stack(x))


def test_what_is_added_to_the_residual_stream_starts_smaller() -> None:
    stack = EncoderStack(LayerConfig(size=64, n_heads=4, inner_size=128), 8)
    initialise(stack, 8)
    for name, p in stack.named_parameters():
        if p.ndim < 2:
            continue
        value, std = float(p.detach().std()), math.sqrt(2 / (5 * p.shape[1]))
        expected = std / 4 if "out_proj" in name or "contract" in name else std
        assert value == pytest.approx(expected, rel=0.1), name
    assert all((p == 0).all() for n, p in stack.named_parameters() if n.endswith("bias"))
