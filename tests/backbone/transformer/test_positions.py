"""Positions against their formulas, and what rotary ones promise."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clplatform.backbone.transformer.attention import MultiHeadAttention
from clplatform.backbone.transformer.config import LayerConfig
from clplatform.backbone.transformer.embeddings import Embeddings
from clplatform.backbone.transformer.positions import Rotary, Sinusoidal, rotate
from clplatform.types import ClplatformError


def test_sinusoidal_positions_are_the_formula() -> None:
    found = Sinusoidal(6)(torch.tensor([[0, 1, 17], [2, 300, 5]]))
    for b, row in enumerate([[0, 1, 17], [2, 300, 5]]):
        for t, position in enumerate(row):
            for i in range(3):
                angle = position / 10000 ** (2 * i / 6)
                expected = [math.sin(angle), math.cos(angle)]
                assert found[b, t, 2 * i : 2 * i + 2].tolist() == pytest.approx(expected, abs=1e-4)


def test_rotary_positions_turn_pairs() -> None:
    """As complex numbers: (x_2i + j x_2i+1) e^(j m θ_i)."""
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    found = rotate(x, Rotary(8)(torch.tensor([[0, 1, 7]])))
    for n in range(2):
        for t, m in enumerate([0, 1, 7]):
            for i in range(4):
                pair = complex(*x[0, n, t, 2 * i : 2 * i + 2].tolist())
                turned = pair * cmath.exp(1j * m * 10000 ** (-2 * i / 8))
                assert found[0, n, t, 2 * i : 2 * i + 2].tolist() == pytest.approx([turned.real, turned.imag], abs=1e-5)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


def test_rotary_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    rotary = Rotary(16)

    def product(m: int, n: int) -> float:
        return float((rotate(q, rotary(torch.tensor([[m]]))) * rotate(k, rotary(torch.tensor([[n]])))).sum())

    for distance in (-3, 0, 5):
        products = [product(m, m + distance) for m in (3, 4, 50, 400)]
        assert products == pytest.approx([products[0]] * 4, abs=1e-3)
    assert abs(product(3, 3) - product(3, 8)) > 0.1


@torch.no_grad()
def test_attention_with_rotary_positions_does_not_change_when_all_tokens_move() -> None:
    torch.manual_seed(0)
    module, x = MultiHeadAttention(LayerConfig(size=16, n_heads=2, inner_size=1)), torch.randn(2, 5, 16)
    place, rotary = torch.arange(5)[None], Rotary(8)
    here, there, reversed_ = (module(x, rotation=rotary(p)) for p in (place, place + 90, place.flip(1)))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(here, reversed_, atol=1e-3)
    assert not torch.allclose(here, module(x), atol=1e-3)


def test_angles_are_computed_in_float32() -> None:
    """In bfloat16 positions 256 and 257 are one."""
    x = torch.ones(1, 1, 2, 8, dtype=torch.bfloat16)
    rotary, sinusoidal = Rotary(8).bfloat16(), Sinusoidal(8).bfloat16()
    place = torch.tensor([[256, 257]])
    found = rotate(x, rotary(place))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), rotate(x.float(), rotary(place)), rtol=0, atol=0.01)
    assert not torch.equal(found[0, 0, 0], found[0, 0, 1])
    assert not torch.equal(sinusoidal(place)[0, 0], sinusoidal(place)[0, 1])


def embeddings(positions: Any, **changes: Any) -> Embeddings:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"n_tokens": 9, "size": 8, "head_size": 4, "positions": positions, "max_length": 6}
    return Embeddings(**settings | changes).eval()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_embeddings_are_the_sum_of_their_parts(positions: str) -> None:
    module = embeddings(positions, scale=3.0, n_segments=2, norm=1e-5)
    tokens, segments = torch.tensor([[4, 4, 8]]), torch.tensor([[0, 1, 1]])
    assert module.segment is not None
    expected = 3 * module.token.weight[tokens] + module.segment.weight[segments]
    if module.position is not None:
        expected = expected + module.position(torch.tensor([[2, 3, 4]]))
    expected = torch.nn.functional.layer_norm(expected, (8,))
    found, rotation = module(tokens, start=2, segments_BT=segments)
    torch.testing.assert_close(found, expected)
    assert (rotation is not None) == (positions == "rotary")
    if rotation is not None:
        assert torch.equal(torch.cat(rotation), torch.cat(Rotary(4)(torch.tensor([[2, 3, 4]]))))
    again, _ = module(tokens, positions_BT=torch.tensor([[2, 3, 4]]), segments_BT=segments)
    assert torch.equal(again, found)


def test_learned_positions_have_an_end() -> None:
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    embeddings("learned")(tokens[:, :6])
    with pytest.raises(ClplatformError, match="7 tokens: the model has positions for 6"):
        embeddings("learned")(tokens)
    for positions in ("sinusoidal", "rotary"):
        assert embeddings(positions)(tokens)[0].shape == (1, 7, 8)


@pytest.mark.parametrize("make", [Sinusoidal, Rotary])
def test_an_odd_size_is_refused(make: Any) -> None:
    with pytest.raises(ClplatformError, match="need an even size, not 7"):
        make(7)


def test_sinusoidal_positions_are_not_saved_or_trained() -> None:
    module = embeddings("sinusoidal")
    assert [name for name, _ in module.state_dict().items()] == ["token.weight"]
    x: Tensor = module(torch.tensor([[1, 2]]))[0]
    assert x.requires_grad
