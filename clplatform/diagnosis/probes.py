"""Linear probes: what a linear classifier can read from frozen features (Alain & Bengio 2017).

A probe is multinomial logistic regression on standardized features with scikit-learn's penalty (C = 1):

    min_{W, b}  1/Σw · Σ_i w_i CE(softmax(W z_i + b), y_i) + 1/(2CΣw) ‖W‖²,   z = (x − mean) / standard deviation
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clplatform.types import MASKED

C = 1.0


@dataclass(frozen=True)
class Probe:
    """A fitted probe: standardization [D], weight [K, D] and bias [K], in double precision."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor, allowed: Tensor | None = None) -> Tensor:
        """features [N, D] → logits [N, K]; `allowed` [N, K]: the classes that a sample may have."""
        logits = (features.to(self.mean) - self.mean) / self.scale @ self.weight.T + self.bias
        return logits if allowed is None else logits.masked_fill(~allowed, MASKED)

    def accuracy(self, features: Tensor, labels: Tensor, allowed: Tensor | None = None) -> float | None:
        """Share of samples whose class is predicted; None without samples."""
        if len(labels) == 0:
            return None
        return (self.logits(features, allowed).argmax(1) == labels).double().mean().item()


def fit_probe(
    features: Tensor, labels: Tensor, n_classes: int, *, weights: Tensor | None = None, allowed: Tensor | None = None,
    c: float = C,
) -> Probe:  # fmt: skip
    """Fit a probe by L-BFGS, to convergence.

    Args:
        features: [N, D].
        labels: classes, int64 [N].
        weights: of the samples [N]; all the same by default. Their mean is made 1.
        allowed: [N, K]: the classes that a sample may have.
        c: inverse strength of the penalty.
    """
    x = features.double()
    w = torch.ones(len(x), dtype=x.dtype, device=x.device) if weights is None else weights.to(x)
    w = w / w.mean()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-12 * (1 + mean.abs()), scale, torch.ones_like(scale))  # constant but for rounding
    z = (x - mean) / scale
    weight = torch.zeros(n_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = z @ weight.T + bias
        if allowed is not None:
            logits = logits.masked_fill(~allowed, MASKED)
        loss = (w * F.cross_entropy(logits, labels, reduction="none")).mean()
        loss = loss + weight.square().sum() / (2 * c * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Probe(mean, scale, weight.detach(), bias.detach())


def balanced(*groups: Tensor) -> Tensor:
    """Weights [N] with which all groups of samples count the same; a sample's group is its value in all of `groups`
    (int64 [N] each)."""
    _, member, sizes = torch.stack(groups).unique(dim=1, return_inverse=True, return_counts=True)
    return 1 / sizes[member].double()
