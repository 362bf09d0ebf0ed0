"""The quadratic program of GEM's dual (Lopez-Paz & Ranzato 2017, Eq. 11), with as many unknowns as there are gradients.

Solved exactly in float64 by an active-set method: non-negative least squares from its normal equations (Lawson & Hanson
1974; Bro & de Jong 1997). A set of free unknowns is solved as if it had no bounds; the one whose bound is most in the
way becomes free, those that fall below their bounds are held there again, until no bound is in the way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def multipliers(gram: Array, inner: Array, margin: float) -> Array:
    """argmin_{v ≥ γ} ½ vᵀ P v + qᵀ v.

    Args:
        gram: P = G Gᵀ [K, K], of gradients G [K, P].
        inner: q = G g [K].
        margin: γ.

    Returns:
        v [K].
    """
    # In v = γ + u/d with d_k = ‖g_k‖ the bounds are zero and the gradients have length 1; one of zeros constrains
    # nothing.
    length = np.sqrt(gram.diagonal())
    unit = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
    slope = inner + margin * gram.sum(1)
    return margin + unit * non_negative(unit[:, None] * gram * unit, unit * slope)


def non_negative(gram: Array, slope: Array) -> Array:
    """argmin_{u ≥ 0} ½ uᵀ P u + qᵀ u, for P = A Aᵀ with rows of length 1 (or 0) and q in its range. u [K]."""
    n = len(slope)
    u, free = np.zeros(n), np.zeros(n, dtype=bool)
    tolerance = 100 * n * np.finfo(np.float64).eps * max(1e-300, float(np.abs(slope).max()))
    for _ in range(10 * n):  # a bound on cycles by rounding; sets do not come back otherwise
        descent = np.where(free, -np.inf, -(slope + gram @ u))
        if descent.max() <= tolerance:
            break
        free[descent.argmax()] = True
        while True:
            target = np.zeros(n)
            target[free] = np.linalg.lstsq(gram[np.ix_(free, free)], -slope[free], rcond=None)[0]
            blocked = free & (target <= 0)
            if not blocked.any():
                break
            # As far as the first bound on the way, which is held from then on.
            reach = (u[blocked] / (u[blocked] - target[blocked] + np.finfo(np.float64).tiny)).min()
            u = u + reach * (target - u)
            free &= u > tolerance
            u[~free] = 0
        u = target
    return u
