"""CKA against its definition with Gram matrices, and what it must and must not be blind to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from clplatform.diagnosis.cka import linear_cka, unbiased_cka, unbiased_hsic

BOTH = pytest.mark.parametrize("cka", [linear_cka, unbiased_cka])


def features(n: int = 40, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related() -> tuple[Tensor, Tensor]:
    """Two representations that have something in common, of different width, with means that are not zero."""
    x = features() + 3
    return x, torch.tanh(x[:, :4] - 3) @ features(4, 9, seed=1) + 0.5 * features(40, 9, seed=2) - 7


def test_plain_cka_is_the_one_of_centered_gram_matrices() -> None:
    """Kornblith et al. 2019: HSIC(K, L) = tr(K H L H) / (N − 1)², H = I − 11ᵀ/N."""
    x, y = (values.numpy() for values in related())
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2

    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert 0.1 < expected < 0.95
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-10)


def test_unbiased_hsic_is_the_mean_over_quadruples_of_different_samples() -> None:
    """Song et al. 2012: E[k(a,b) (l(a,b) + l(c,d) − 2 l(a,c))] over samples a, b, c, d without repetition."""
    x, y = features(7, 3), features(7, 2, seed=1)
    k, m = x @ x.T, y @ y.T
    terms = [k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c]) for a, b, c, d in itertools.permutations(range(7), 4)]
    assert unbiased_hsic(k, m).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-10)


@BOTH
def test_invariances(cka) -> None:
    x, y = related()
    rotation = torch.linalg.qr(features(6, 6, seed=3)).Q
    value = cka(x, y)
    assert cka(x @ rotation, y) == pytest.approx(value, rel=1e-9)
    assert cka(-4.2 * x, y) == pytest.approx(value, rel=1e-9)
    assert cka(x + 100, y) == pytest.approx(value, rel=1e-6)
    assert cka(y, x) == pytest.approx(value, rel=1e-9)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert cka(x[order], y[order]) == pytest.approx(value, rel=1e-9)
    assert cka(x, 0.1 * x @ rotation) == pytest.approx(1, abs=1e-9)
    # Not blind to any linear map, nor to which sample is which.
    assert abs(cka(x * torch.tensor([30.0, 1, 1, 1, 1, 1]), y) - value) > 0.01
    assert cka(x[order], y) < 0.5 * value


def test_with_few_samples_only_the_unbiased_one_finds_nothing_where_there_is_nothing() -> None:
    pairs = [(features(20, 60, seed=2 * s), features(20, 60, seed=2 * s + 1)) for s in range(30)]
    plain = np.mean([linear_cka(x, y) for x, y in pairs])
    unbiased = np.mean([unbiased_cka(x, y) for x, y in pairs])
    assert plain > 0.6
    assert abs(unbiased) < 0.02


@BOTH
def test_constant_features_have_no_similarity(cka) -> None:
    assert cka(torch.full((10, 3), 0.1), features(10)) is None
    assert cka(features(10), torch.full((10, 3), 1e6)) is None


def test_too_few_samples() -> None:
    assert unbiased_cka(features(3), features(3)) is None
