"""Running statistics of features, and classifiers that are computed from such statistics instead of trained.

What an experience adds is added exactly: after any number of experiences, in any order, the statistics are those of all
samples at once, up to rounding in float64 (float32 on devices that have no float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.types import MASKED


def precise(x: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


class Moments:
    """Mean of every class and, on request, the scatter within classes.

    Attributes:
        counts: samples of each class [K].
        means: [K, D], zero for a class without samples.
        scatter: Σ_k Σ_{x of class k} (x − μ_k)(x − μ_k)ᵀ [D, D].

    Args:
        feature_size: D.
        scatter: keep it?
    """

    def __init__(self, feature_size: int, *, scatter: bool = False) -> None:
        self.counts = precise(torch.zeros(0))
        self.means = precise(torch.zeros(0, feature_size))
        self.scatter = precise(torch.zeros(feature_size, feature_size)) if scatter else None

    def update(self, features: Tensor, labels: Tensor, n_classes: int) -> None:
        """Add samples: features [N, D], their classes [N] on the same device. Both are moved there if need be.

        Batches of any size give the same (Chan, Golub & LeVeque 1983, Eq. 2.1b, for each class).
        """
        x = precise(features)
        self.to(x.device)
        n_new = max(0, n_classes - len(self.counts))
        counts, means = F.pad(self.counts, (0, n_new)), F.pad(self.means, (0, 0, 0, n_new))
        added = torch.bincount(labels, minlength=len(counts)).to(x)
        batch = torch.zeros_like(means).index_add_(0, labels, x) / added.clamp_min(1)[:, None]
        gap = torch.where(added[:, None] > 0, batch - means, torch.zeros_like(means))
        total = (counts + added).clamp_min(1)
        if self.scatter is not None:
            deviation = x - batch[labels]
            between = (counts * added / total)[:, None] * gap
            self.scatter = self.scatter + deviation.T @ deviation + between.T @ gap
        self.counts, self.means = counts + added, means + (added / total)[:, None] * gap

    @property
    def covariance(self) -> Tensor:
        """Within classes, of all samples together (the maximum-likelihood estimate) [D, D]."""
        assert self.scatter is not None, "the scatter is not kept"
        return self.scatter / self.counts.sum().clamp_min(1)

    def to(self, device: torch.device) -> None:
        dtype = precise(torch.empty(0, device=device)).dtype
        self.load_state_dict({name: value.to(device, dtype) for name, value in self.state_dict().items()})

    def n_floats(self) -> int:
        return sum(value.numel() for value in self.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        scatter = {} if self.scatter is None else {"scatter": self.scatter}
        return {"counts": self.counts, "means": self.means, **scatter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.means, self.scatter = state["counts"], state["means"], state.get("scatter")


class Readout(nn.Module):
    """A linear classifier whose weights are computed. It is part of the model and saved with it, in float32.

    Args:
        feature_size: D.
    """

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    known: Tensor  # [K]: does the class have weights yet?

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0, feature_size))
        self.register_buffer("bias", torch.zeros(0))
        self.register_buffer("known", torch.zeros(0, dtype=torch.bool))

    def grow(self, n_classes: int) -> None:
        """Make room for so many classes; idempotent."""
        n = max(0, n_classes - len(self.weight))
        self.weight = F.pad(self.weight, (0, 0, 0, n))
        self.bias, self.known = F.pad(self.bias, (0, n)), F.pad(self.known, (0, n))

    def set(self, weight: Tensor, bias: Tensor, known: Tensor) -> None:
        """Replace all weights: [K, D], [K] and bool [K]. They stay in float32 where the model is trained in less."""
        self.weight, self.bias, self.known = weight.float(), bias.float(), known

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] → logits [B, K] in float32, `MASKED` for a class without weights.

        In double precision, because logits are small differences of large numbers; autocast leaves it alone.
        """
        logits = precise(features) @ precise(self.weight).T + precise(self.bias)
        return logits.float().masked_fill(~self.known, MASKED)

    def n_floats(self) -> int:
        return self.weight.numel() + self.bias.numel()
