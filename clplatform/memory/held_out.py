"""A memory of which every class keeps a share apart from training: for what is fitted on samples never trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def n_held_out(n: int, share: float) -> int:
    """⌈share · n⌉: how many of a class's `n` samples in the memory are held out."""
    return math.ceil(round(share * n, 9))  # 0.07 · 100 is a little more than 7


def draw_held_out(labels: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Positions of `n` random samples of each class, of a small class at most half; sorted, int64."""
    order = torch.randperm(len(labels), generator=generator)
    of_class = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([rows[: min(n, len(rows) // 2)] for rows in of_class]).sort().values if of_class else order


def ranked(labels: Tensor, held: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Random ranks within each class, in which every prefix holds out its share.

    Args:
        labels: classes, int64 [N].
        held: bool [N].

    Returns:
        int64 [N]: of a class's first n samples `n_held_out(n, share)` are held out, if it has so many.
    """
    rank, random = torch.empty_like(labels), torch.rand(len(labels), generator=generator)
    for c in labels.unique():
        rows = (labels == c).nonzero()[:, 0]
        rows = rows[torch.argsort(random[rows])]
        kept, others = rows[held[rows]], rows[~held[rows]]
        # ⌈share · n⌉ becomes i + 1 at n = ⌊i / share⌋ + 1, so there the i-th comes; the others fill the places between.
        places = (torch.arange(len(kept), dtype=torch.float64) / share + 1e-9).floor()
        between = torch.arange(len(rows), dtype=torch.float64)
        between = between[~torch.isin(between, places)][: len(others)]
        rank[torch.cat([kept, others])[torch.argsort(torch.cat([places, between]))]] = torch.arange(len(rows))
    return rank
