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


def test_a_singular_gram_matrix_is_solved_too() -> None:
    """Far fewer samples than features, and a strength below the rounding errors of G."""
    h, y = data(10, 40)
    h = 1e6 * h
    gram, cross = sums(h, y)
    assert torch.linalg.cholesky_ex(gram + 1e-8 * torch.eye(40)).info > 0
    weight = ridge.solve(gram, cross, 1e-8)
    torch.testing.assert_close(h @ weight, y, rtol=1e-4, atol=1e-4)  # it interpolates


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
