"""Attention against its formula, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clplatform.backbone.transformer.attention import MultiHeadAttention, attention, causal_mask, padding_mask
from clplatform.backbone.transformer.config import LayerConfig
from clplatform.types import ClplatformError

B, N, T, S, H = 2, 3, 5, 7, 4


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """One query at a time; `seen` [B, N, T, S]."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys = [s for s in range(k.shape[2]) if seen[b, n, t, s]]
                exp = [math.exp(float(q[b, n, t] @ k[b, n, s]) / math.sqrt(q.shape[3])) for s in keys]
                for weight, s in zip(exp, keys, strict=True):
                    out[b, n, t] += weight / sum(exp) * v[b, n, s]
    return out


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(2 * torch.randn(B, N, n, H, dtype=torch.float64) for n in (T, S, S))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["all", "padding", "causal", "both", "any"])
def test_it_is_the_formula(kind: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens = torch.tensor([[1] * S, [1, 1, 1, 0, 1, 0, 0]])
    masks = {
        "all": None, "padding": padding_mask(tokens), "causal": causal_mask(T, S, torch.device("cpu")),
        "both": causal_mask(T, S, torch.device("cpu")) & padding_mask(tokens),
        "any": torch.rand(B, N, T, S, generator=torch.Generator().manual_seed(1)) < 0.5,
    }  # fmt: skip
    mask = masks[kind]
    seen = torch.ones(B, N, T, S, dtype=torch.bool) if mask is None else mask.expand(B, N, T, S)
    torch.testing.assert_close(attention(*qkv, mask), written_out(*qkv, seen))


def test_causal_is_the_causal_mask(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    square = q, k[:, :, :T], v[:, :, :T]
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(causal_mask(T, T, torch.device("cpu")), seen)
    torch.testing.assert_close(attention(*square, causal=True), written_out(*square, seen.expand(B, N, T, T)))


def test_masks_say_who_sees_whom() -> None:
    assert causal_mask(2, 4, torch.device("cpu")).tolist() == [[True, True, True, False], [True] * 4]
    assert padding_mask(torch.tensor([[1, 0]])).tolist() == [[[[True, False]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_sees_nothing_gets_zeros(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, N, T, H, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    mask[0, :, 2] = False
    out = attention(q, k, v, mask)
    assert (out[0, :, 2] == 0).all()
    assert (out[1, :, 2] != 0).all()
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("cross", [False, True])
def test_heads_are_projected_attended_and_joined(cross: bool) -> None:
    """Head by head, with its own rows of the projections."""
    torch.manual_seed(0)
    module = MultiHeadAttention(LayerConfig(size=N * H, n_heads=N, inner_size=1)).double()
    x, memory = torch.randn(B, T, N * H, dtype=torch.float64), torch.randn(B, S, N * H, dtype=torch.float64)
    seen = memory if cross else x
    heads = []
    for n in range(N):
        rows = slice(n * H, (n + 1) * H)
        q, k, v = (
            y @ layer.weight[rows].T + layer.bias[rows]
            for y, layer in ((x, module.q_proj), (seen, module.k_proj), (seen, module.v_proj))
        )
        heads.append(torch.softmax(q @ k.mT / math.sqrt(H), -1) @ v)
    expected = torch.cat(heads, -1) @ module.out_proj.weight.T + module.out_proj.bias
    torch.testing.assert_close(module(x, memory if cross else None), expected)


def test_weights_are_dropped_while_training_only() -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(LayerConfig(size=8, n_heads=2, inner_size=1, attention_dropout=0.5))
    x = torch.randn(B, T, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_heads_that_do_not_divide_the_size_are_refused() -> None:
    with pytest.raises(ClplatformError, match="n_heads=3 does not divide size=8"):
        LayerConfig(size=8, n_heads=3, inner_size=1)
