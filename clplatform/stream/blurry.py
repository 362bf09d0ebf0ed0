"""Streams that do not say where a task ends (Bang et al. 2021, "Rainbow Memory", Sec. 3: Blurry-M).

Of every class's training samples in an experience a share M goes to the other experiences, in equal numbers; the others stay.
A class is then met before and after the experience that has most of it, and the data changes gradually. With M = 0 it changes
at once, but nobody is told. What is evaluated stays as it was: each experience's validation and test samples are of its own
classes, so that a column of the accuracy matrix is still one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from clplatform.data import derive_seed
from clplatform.stream.base import InMemoryStream
from clplatform.types import ClplatformError, Experience


def blurry(stream: InMemoryStream, share: float, seed: int | None) -> InMemoryStream:
    """The stream without boundaries.

    Args:
        share: M, of each class's training samples.
        seed: which samples go where.

    Raises:
        ClplatformError: its task ids tell tasks apart, an experience annotates its own classes only, or there is nothing to
            mix.
    """
    info, where = stream.info, f"stream.blurry={share:g}: stream={stream.info.name}"
    if info.task_ids:
        raise ClplatformError(f"{where} is {info.scenario}, and task ids are boundaries; choose class_incremental")
    if info.problem == "token_classification":
        raise ClplatformError(f"{where} annotates an experience's own classes only, which mixed texts would contradict")
    if len(stream) == 1:
        raise ClplatformError(f"{where} has one experience, so there are no boundaries to take away; leave it null")
    note = f"no boundaries: {share:.0%} of each class's training samples are in other experiences than its own"
    return replace(
        stream,
        info=replace(info, boundaries=False),
        experiences=mixed(stream.experiences, share, seed),
        notes=[*stream.notes, note],
    )


def mixed(experiences: Sequence[Experience], share: float, seed: int | None) -> list[Experience]:
    """Experiences that have exchanged a share of their training samples, and show the classes that they now have."""
    generator = torch.Generator().manual_seed(derive_seed(seed or 0, "blurry"))
    dealt = [deal(groups(e), share, i, len(experiences), generator) for i, e in enumerate(experiences)]
    found, seen = [], 0
    for i, experience in enumerate(experiences):
        parts = [e.train.select(rows[i]) for e, rows in zip(experiences, dealt, strict=True) if len(rows[i])]
        train = reduce(add, parts)
        # Where there are none, tokens or places in a text are predicted.
        classes = tuple(train.labels.unique().tolist()) if experience.classes else ()
        seen = max(seen, experience.n_seen_classes, *(c + 1 for c in classes))
        found.append(replace(experience, train=train, classes=classes, n_seen_classes=seen, is_boundary=False))
    return found


def groups(experience: Experience) -> Tensor:
    """What every training sample is dealt with, int64 [N]: its class, where it has one."""
    labels = experience.train.labels
    return labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.int64)


def deal(groups: Tensor, share: float, own: int, n: int, generator: torch.Generator) -> list[Tensor]:
    """Rows of an experience's data that each of `n` experiences gets, ascending, int64 each.

    Args:
        groups: int64 [N]; each is dealt evenly.
        own: the experience whose data it is, which keeps what is not shared.
    """
    to = torch.full((len(groups),), own)
    others = torch.tensor([i for i in range(n) if i != own])
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)][: round(share * len(rows))]
        # From anywhere on, else what is left over goes to the first ones.
        first = int(torch.randint(len(others), (1,), generator=generator))
        to[rows] = others[(first + torch.arange(len(rows))) % len(others)]
    return [(to == i).nonzero()[:, 0] for i in range(n)]
