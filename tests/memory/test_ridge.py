"""Ridge regression from sums against scikit-learn, and the choice of its strength against trying all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from clplatform.memory import ridge

STRENGTHS = [10.0**e for e in range(-8, 9)]


def identity(x: Tensor) -> Tensor:
    return x


def data(n: int, m: int, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, m, generator=g, dtype=torch.float64)
    w = torch.randn(m, k, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return h, h @ w + 4 * torch.randn(n, k, generator=g, dtype=torch.float64)


def sums(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    gram, cross = h.new_zeros(h.shape[1], h.shape[1]), h.new_zeros(h.shape[1], y.shape[1])
    ridge.add(gram, cross, identity, h, y)
    return gram, cross


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_sums_and_solution(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "CHUNK_FLOATS", chunk)  # 1: one sample at a time
    h, y = data(60, 20)
    gram, cross = sums(h, y)
    torch.testing.assert_close(gram, h.T @ h)
    torch.testing.assert_close(cross, h.T @ y)
    for strength in (1e-3, 1.0, 100.0):
        expected = Ridge(alpha=strength, fit_intercept=False, solver="svd").fit(h.numpy(), y.numpy()).coef_
        np.testing.assert_allclose(ridge.solve(gram, cross, strength).T.numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(gram, h.T @ h)  # left as it was


@pytest.mark.parametrize("strength", [1e-8, 1e-4, 1.0, 1e4])
def test_a_singular_gram_matrix_is_solved_too(strength: float) -> None:
    """Far fewer samples than features, and strengths around and below the rounding errors of G (here about 1)."""
    h, y = data(10, 40)
    h = 1e6 * h
    gram, cross = sums(h, y)
    weight = ridge.solve(gram, cross, strength)
    expected = h.T @ torch.linalg.solve(h @ h.T + strength * torch.eye(10), y)  # the same, and well-conditioned
    assert 1e-10 < expected.abs().max() < 1e-4
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(h @ weight, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [20, 200])
def test_dead_and_repeated_features_do_no_harm(n: int) -> None:
    """Neither on held-out samples nor in the solution; of what is doubled each half has half the weight."""
    (h, y), held = data(n, 31), data(50, 31, seed=9)
    dead = torch.zeros(n, 5, dtype=torch.float64)
    wide, wide_held = torch.cat([h, h, dead], 1), torch.cat([held[0], held[0], dead[:1].expand(50, 5)], 1)
    narrow = ridge.best_strength(
        identity, (2**0.5 * h, y), (2**0.5 * held[0], held[1]), *sums(2**0.5 * h, y), STRENGTHS
    )
    assert ridge.best_strength(identity, (wide, y), (wide_held, held[1]), *sums(wide, y), STRENGTHS) == narrow
    weight = ridge.solve(*sums(wide, y), 1e-8)
    expected = ridge.solve(*sums(h, y), 5e-9) / 2
    torch.testing.assert_close(weight, torch.cat([expected, expected, dead[:1].T.expand(5, 3)]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [12, 30, 31, 200], ids=["dual", "dual, last", "primal, first", "primal"])
def test_the_best_strength_is_that_of_trying_all(n: int) -> None:
    chosen = set()
    for seed in range(4):
        h, y = data(n, 31, seed=seed)
        held = data(50, 31, seed=100 + seed)
        errors = []
        for strength in STRENGTHS:
            model = Ridge(alpha=strength, fit_intercept=False, solver="svd").fit(h.numpy(), y.numpy())
            errors.append(((model.predict(held[0].numpy()) - held[1].numpy()) ** 2).mean())
        found = ridge.best_strength(identity, (h, y), held, *sums(h, y), STRENGTHS)
        assert found == STRENGTHS[int(np.argmin(errors))]
        chosen.add(found)
    assert 1e-8 < min(chosen) <= max(chosen) < 1e8
