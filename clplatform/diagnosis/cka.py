"""Similarity of two representations of the same samples: centered kernel alignment with a linear kernel.

    CKA(K, L) = HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)),   K = X Xᵀ,  L = Y Yᵀ

Kornblith, Norouzi, Lee & Hinton 2019, "Similarity of Neural Network Representations Revisited". It is 1 for
representations that are the same up to an orthogonal transform and one scale, and may compare layers of different width.

With few samples and many features the plain estimate of HSIC is far too high: representations that have nothing in common
get the value D/(N+D) or so. `unbiased_cka` takes HSIC₁ instead (Song et al. 2012, as in Nguyen, Raghu & Kornblith 2021, "Do
Wide and Deep Networks Learn the Same Things?"), which is 0 on average for what has nothing in common, and may be below.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """CKA of X [N, D] and Y [N, E]: ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of the centered ones. None: one of them is constant."""
    x, y = (_centered(values) for values in (x, y))
    return _ratio((y.T @ x).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum(), x, y)


def unbiased_cka(x: Tensor, y: Tensor) -> float | None:
    """The same with the unbiased HSIC. None: less than four samples, or one representation is constant."""
    if len(x) < 4:
        return None
    x, y = (_centered(values) for values in (x, y))  # rounds less; the estimate does not depend on the mean
    g, h = (values @ values.T for values in (x, y))
    return _ratio(unbiased_hsic(g, h), unbiased_hsic(g, g), unbiased_hsic(h, h), x, y)


def unbiased_hsic(g: Tensor, h: Tensor) -> Tensor:
    """HSIC₁ of two kernel matrices [N, N], N ≥ 4 (Song et al. 2012, Eq. 5):

    1/(N(N−3)) · (tr(G̃ H̃) + 1ᵀG̃1 · 1ᵀH̃1 / ((N−1)(N−2)) − 2/(N−2) · 1ᵀG̃ H̃1),  G̃: G with a zero diagonal
    """
    n = len(g)
    g, h = (values - torch.diag(values.diagonal()) for values in (g, h))
    rows_g, rows_h = g.sum(1), h.sum(1)
    both = rows_g.sum() * rows_h.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_g @ rows_h)
    return ((g * h).sum() + both) / (n * (n - 3))


def _centered(values: Tensor) -> Tensor:
    values = values.double()
    return values - values.mean(0)


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor, x: Tensor, y: Tensor) -> float | None:
    # Constant but for rounding: there is nothing to compare. The unbiased estimate of noise alone may be below zero.
    constant = any(len(v) == 0 or v.abs().max() <= 1e-12 for v in (x, y))
    if constant or own_x <= 0 or own_y <= 0:
        return None
    return float(cross / (own_x.sqrt() * own_y.sqrt()))
