"""Herding written out, for tests of what chooses exemplars."""

from __future__ import annotations

import torch
from torch import Tensor


def brute_force(features: Tensor, n: int, *, normalise: bool = True) -> list[int]:
    """Positions of the first `n` exemplars of one class, by Algorithm 4 of iCaRL tried on every candidate."""
    phi = features.double()
    if normalise:
        phi = phi / phi.norm(dim=1, keepdim=True).clamp_min(1e-12)
    mean = phi.sum(0) / len(phi)
    chosen: list[int] = []
    for k in range(1, min(n, len(phi)) + 1):
        distance = {}
        for i in range(len(phi)):
            if i not in chosen:
                distance[i] = (mean - torch.stack([phi[j] for j in [*chosen, i]]).sum(0) / k).norm().item()
        chosen.append(min(distance, key=distance.__getitem__))
    return chosen
