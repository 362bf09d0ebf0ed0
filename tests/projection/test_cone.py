"""The dual of GEM against another solver, against every set of active bounds, and its optimality conditions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import quadprog

from clplatform.projection.cone import multipliers


def problem(k: int, dim: int, seed: int, spread: float = 0.0) -> tuple[Any, Any]:
    """Gradients G [K, P] whose lengths differ by 10^±spread, and g [P] that conflicts with many of them."""
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(k, dim)) + 0.5 * rng.normal(size=dim)
    return G * 10 ** rng.uniform(-spread, spread, size=(k, 1)), rng.normal(size=dim) - rng.uniform(-1, 2, size=k) @ G


def value(G: Any, g: Any, v: Any) -> float:
    """½ vᵀ G Gᵀ v + (G g)ᵀ v"""
    return float(0.5 * v @ (G @ G.T) @ v + (G @ g) @ v)


def by_enumeration(G: Any, g: Any, margin: float) -> Any:
    """The best of all points that are stationary with some unknowns at their bound and the others free."""
    k, P, q = len(G), G @ G.T, G @ g
    best, least = np.full(k, margin), value(G, g, np.full(k, margin))
    for free in itertools.chain.from_iterable(itertools.combinations(range(k), n) for n in range(1, k + 1)):
        held = [i for i in range(k) if i not in free]
        v = np.full(k, margin)
        v[list(free)] = np.linalg.pinv(P[np.ix_(free, free)]) @ -(q[list(free)] + margin * P[np.ix_(free, held)].sum(1))
        if (v >= margin - 1e-9).all() and value(G, g, v) < least - 1e-12:
            best, least = v, value(G, g, v)
    return best


def optimal(G: Any, g: Any, v: Any, margin: float) -> None:
    """Karush, Kuhn and Tucker: v ≥ γ, G g̃ ≥ 0, and (v − γ)·(G g̃) = 0 one by one."""
    length = np.linalg.norm(G, axis=1)
    unit = G / np.where(length > 0, length, 1)[:, None]
    found = g + G.T @ v
    scale = np.linalg.norm(g) + margin * length.sum()
    assert (v >= margin).all()
    assert (unit @ found >= -1e-9 * scale).all()
    assert np.abs((v - margin) * length * (unit @ found)).max() <= 1e-8 * scale**2


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize(("k", "dim"), [(1, 5), (2, 2), (3, 40), (8, 30), (20, 200), (50, 60)])
def test_agrees_with_another_solver(k: int, dim: int, margin: float) -> None:
    n_free = 0
    for seed in range(5):
        G, g = problem(k, dim, seed)
        v = multipliers(G @ G.T, G @ g, margin)
        # quadprog: min ½ xᵀ P x − aᵀ x with Cᵀ x ≥ b
        expected = quadprog.solve_qp(G @ G.T, -G @ g, np.eye(k), np.full(k, margin))[0]
        np.testing.assert_allclose(v, expected, rtol=1e-6, atol=1e-8)
        optimal(G, g, v, margin)
        n_free += int((v > margin + 1e-6).sum())
    assert 0 < n_free < 5 * k


@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("seed", range(6))
def test_is_the_best_of_all_sets_of_active_bounds(seed: int, margin: float) -> None:
    G, g = problem(6, 20, seed)
    v = multipliers(G @ G.T, G @ g, margin)
    np.testing.assert_allclose(v, by_enumeration(G, g, margin), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_more_gradients_than_dimensions(seed: int, margin: float) -> None:
    """v is not unique then, the projection is."""
    G, g = problem(12, 4, seed)
    v = multipliers(G @ G.T, G @ g, margin)
    optimal(G, g, v, margin)
    np.testing.assert_allclose(G.T @ v, G.T @ by_enumeration(G, g, margin), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_equal_opposite_and_zero_gradients(margin: float) -> None:
    G, g = problem(3, 10, 0)
    for rows in (
        [G[0], G[0], G[0]],
        [G[0], -G[0], G[1]],
        [G[0], 0 * G[0], G[1]],
        [0 * G[0]],
        [G[0], 1e-9 * G[0], G[2]],
    ):
        A = np.stack(rows)
        v = multipliers(A @ A.T, A @ g, margin)
        optimal(A, g, v, margin)
        np.testing.assert_allclose(A.T @ v, A.T @ by_enumeration(A, g, margin), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_lengths_that_differ_by_orders_of_magnitude(seed: int) -> None:
    """What a sample's loss weighs must not decide whether its constraint is kept."""
    G, g = problem(10, 60, seed, spread=4.0)
    optimal(G, g, multipliers(G @ G.T, G @ g, 0.0), 0.0)
    G, g = problem(10, 60, seed)
    for scale in (1e-12, 1e12):
        v = multipliers(scale**2 * G @ G.T, scale**2 * G @ g, 0.5)
        np.testing.assert_allclose(v, multipliers(G @ G.T, G @ g, 0.5), rtol=1e-6)


def test_without_a_conflict_and_without_margin_nothing_is_added() -> None:
    G, _ = problem(4, 30, 0)
    g = np.linalg.pinv(G) @ np.array([1.0, 2.0, 0.5, 0.0])
    assert multipliers(G @ G.T, np.maximum(G @ g, 0), 0.0).tolist() == [0, 0, 0, 0]
