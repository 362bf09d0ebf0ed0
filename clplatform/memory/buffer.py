"""A memory of fixed capacity, from which replay strategies draw.

Which samples stay is decided by one number a sample: a key drawn uniformly from [0, 1) when it arrives.
Keeping the `capacity` smallest keys of all that ever arrived is a uniform sample without replacement of
them (bottom-k sampling; Efraimidis & Spirakis 2006 with equal weights), like Vitter's reservoir, but
whole batches are added at once. `class_balanced` makes scores of keys and labels; see `balanced`. Where a
strategy ranks the samples itself (herding), the key is the rank plus the random number.

Rows are stored in tensors allocated once, at the first samples.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from clplatform.data import PADDING, TensorData, concat, trim
from clplatform.types import Batch, Data, Output

Policy = Literal["reservoir", "class_balanced"]


def balanced(keys: Tensor, labels: Tensor) -> Tensor:
    """Scores of which the lowest stay, so that classes are balanced. keys [N] float64, labels [N] → [N].

    The key's rank within its class, plus the key's random part in [0, 1): classes get equal shares (those with few samples
    leave room to the others), and each class keeps its lowest keys: a uniform sample of its own, or its best-ranked ones.
    What is left when shares are equal goes to classes drawn at random.
    """
    order = torch.argsort(keys)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, then by key
    sorted_labels = labels[order]
    _, counts = torch.unique_consecutive(sorted_labels, return_counts=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts.repeat_interleave(counts)
    return rank + keys % 1


class Buffer:
    """At most `capacity` samples, as rows of a batch without augmentation.

    Args:
        capacity: samples.
        policy: which samples stay.
        device: where the rows live (`cpu` or a device's name).
        group: the integer column whose values get equal shares if the policy is `class_balanced`.
    """

    def __init__(
        self, *, capacity: int, policy: Policy = "reservoir", device: str = "cpu", group: str = "labels"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: a buffer holds at least one sample")
        self.capacity, self.device, self.group = capacity, torch.device(device), group
        self.policy: Policy = policy
        self.rows: Batch = {}  # name → [capacity, ...]
        self.keys = torch.zeros(0, dtype=torch.float64)  # [n] of the rows that are there
        self.n_seen = 0  # samples that ever arrived

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def labels(self) -> Tensor:
        """Classes of the stored samples, int64 [n]."""
        return self.column("labels")

    def column(self, name: str) -> Tensor:
        """A column of the stored samples [n, ...], by their place; int64 [0] if there are none."""
        return self.rows[name][: len(self)] if self.rows else torch.zeros(0, dtype=torch.int64)

    def add(self, batch: Batch, generator: torch.Generator, rank: Tensor | None = None) -> None:
        """Let the samples of a batch compete for a place.

        Args:
            batch: rows [B, ...], unaugmented (`raw_rows`).
            generator: draws the keys.
            rank: place of each sample in its group, int64 [B]: under `class_balanced` the lowest stay. None: random.
        """
        new = torch.rand(len(batch["labels"]), generator=generator, dtype=torch.float64)
        if rank is not None:
            new = new + rank.cpu()
        self.n_seen += len(new)
        full = len(self) == self.capacity
        if full and self.policy == "reservoir":  # most of a long stream ends here, without a look at the rows
            candidates = (new < self.keys.max()).nonzero()[:, 0]
            if len(candidates) == 0:
                return
            batch, new = {k: v[candidates.to(v.device)] for k, v in batch.items()}, new[candidates]
        keys = torch.cat([self.keys, new])
        scores = keys
        if self.policy == "class_balanced":
            scores = balanced(keys, torch.cat([self.column(self.group).cpu(), batch[self.group].cpu()]))
        stays = torch.zeros(len(keys), dtype=torch.bool)
        stays[torch.argsort(scores)[: self.capacity]] = True
        old, new_stay = stays[: len(self)], stays[len(self) :].nonzero()[:, 0]
        free = torch.cat([(~old).nonzero()[:, 0], torch.arange(len(self), self.capacity)])[: len(new_stay)]
        self.keys = torch.cat([self.keys, self.keys.new_zeros(min(self.capacity, len(keys)) - len(self))])
        self.keys[free] = new[new_stay]
        self._write(free, {k: v[new_stay.to(v.device)] for k, v in batch.items()})

    def add_all(self, data: Data, generator: torch.Generator, **constant: int) -> None:
        """Let every sample of `data` compete once; `constant`: more columns, with one value each."""
        for rows in torch.arange(len(data)).split(1024):
            more = {name: torch.full((len(rows),), value) for name, value in constant.items()}
            self.add({**raw_rows(data.fetch(rows)), **more}, generator)

    def add_ranked(self, data: Data, rank: Tensor, generator: torch.Generator, **more: Tensor) -> None:
        """Let the samples of `data` compete by class, the lowest ranks first; only those that can win are fetched.

        Args:
            rank: of each sample within its class, int64 [N]; from 0, without gaps.
            more: further columns [N].
        """
        chosen = (rank < self.share(data.labels)).nonzero()[:, 0]
        columns = {name: value[chosen] for name, value in more.items()}
        self.add({**raw_rows(data.fetch(chosen)), **columns}, generator, rank[chosen])

    def share(self, labels: Tensor) -> int:
        """The most samples that a class can keep when samples of these classes [N] have arrived too."""
        counts = torch.unique(torch.cat([self.labels.cpu(), labels.cpu()]), return_counts=True)[1]
        n = min(self.capacity, int(counts.sum()))
        return bisect_left(range(n + 1), n, key=lambda share: int(counts.clamp(max=share).sum()))

    def _write(self, places: Tensor, rows: Batch) -> None:
        places = places.to(self.device)
        for name, value in rows.items():
            value = value.to(self.device)
            stored = self.rows.get(name)
            if stored is None:
                stored = value.new_zeros((self.capacity, *value.shape[1:]))
            if name in PADDING and value.ndim == 2 and value.shape[1] != stored.shape[1]:
                stored, value = _same_length(name, stored, value)
            stored[places] = value
            self.rows[name] = stored

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """`n` stored samples, uniformly and without repetition (all of them if there are fewer)."""
        return self.take(torch.randperm(len(self), generator=generator)[:n])

    def take(self, places: Tensor) -> Batch:
        """The stored samples at these places, as a batch."""
        places = places.to(self.device)
        return trim({name: column[places] for name, column in self.rows.items()})

    def as_data(self, source: int = 0) -> TensorData:
        """A copy of the stored samples as data to train on, whose rows carry `source`."""
        rows = self.take(torch.arange(len(self)))
        return TensorData({n: v.cpu() for n, v in rows.items()}, transform=partial(_with_source, source=source))

    @property
    def n_bytes(self) -> int:
        """Bytes of the rows that are allocated."""
        return sum(column.numel() * column.element_size() for column in self.rows.values())

    def cost(self) -> dict[str, int | float]:
        return {"stored_samples": len(self), "buffer_bytes": self.n_bytes}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "keys": self.keys, "n_seen": self.n_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = {name: column.to(self.device) for name, column in state["rows"].items()}
        self.keys, self.n_seen = state["keys"].cpu(), state["n_seen"]


def raw_rows(batch: Batch, source: int | None = 0) -> Batch:
    """The rows of a batch as they were before augmentation, only those from `source` (None: all).

    Replayed rows carry another source, so that a buffer does not count its own samples again.
    """
    rows = {n: batch.get(f"raw_{n}", v) for n, v in batch.items() if not n.startswith("raw_") and n != "source"}
    if source is None:
        return rows
    chosen = batch["source"] == source
    return {name: value[chosen] for name, value in rows.items()}


def append(batch: Batch, rows: Batch, source: int) -> Batch:
    """The batch with `rows` added, which carry `source`; on the batch's device."""
    device = batch["labels"].device
    rows = {name: value.to(device, non_blocking=True) for name, value in rows.items() if name in batch}
    rows["source"] = torch.full((len(rows["labels"]),), source, dtype=torch.int64, device=device)
    return concat([batch, rows])


def pick(batch: Batch, output: Output, chosen: Tensor) -> tuple[Batch, Output]:
    """The rows `chosen` [B] (bool) of a batch and of the model's output."""
    # Beside replayed rows, a column may hold only the stream's.
    part = {name: value[chosen] for name, value in batch.items() if len(value) == len(chosen)}
    return part, Output(output.logits[chosen], output.features[chosen])


def _with_source(batch: Batch, source: int) -> Batch:
    return {**batch, "source": torch.full((len(batch["labels"]),), source)}


def _same_length(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    length = max(a.shape[1], b.shape[1])
    pad = torch.nn.functional.pad
    return tuple(pad(x, (0, length - x.shape[1]), value=PADDING[name]) for x in (a, b))  # type: ignore[return-value]
