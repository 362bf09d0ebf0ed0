"""A memory of fixed capacity, from which replay strategies draw.

Which samples stay is decided by one number a sample: a key drawn uniformly from [0, 1) when it arrives.
Keeping the `capacity` smallest keys of all that ever arrived is a uniform sample without replacement of
them (bottom-k sampling; Efraimidis & Spirakis 2006 with equal weights), like Vitter's reservoir, but
whole batches are added at once. Other policies are other scores made from keys and labels; see `score`.

Rows are stored in tensors allocated once, at the first samples.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from clplatform.data import PADDING, concat, trim
from clplatform.types import Batch

Policy = Literal["reservoir", "class_balanced"]


def score(policy: Policy, keys: Tensor, labels: Tensor) -> Tensor:
    """The samples with the lowest scores stay. keys [N] float64 in [0, 1), labels [N] → scores [N].

    * `reservoir`: the key: a uniform sample of everything that arrived.
    * `class_balanced`: the key's rank within its class, plus the key: classes get equal shares (those with few
      samples leave room to the others), and each class keeps a uniform sample of its own.
    """
    if policy == "reservoir":
        return keys
    order = torch.argsort(keys)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, then by key
    sorted_labels = labels[order]
    _, counts = torch.unique_consecutive(sorted_labels, return_counts=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts.repeat_interleave(counts)
    return rank + keys


class Buffer:
    """At most `capacity` samples, as rows of a batch without augmentation.

    Args:
        capacity: samples.
        policy: which samples stay.
        device: where the rows live (`cpu` or a device's name).
    """

    def __init__(self, *, capacity: int, policy: Policy = "reservoir", device: str = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: a buffer holds at least one sample")
        self.capacity, self.device = capacity, torch.device(device)
        self.policy: Policy = policy
        self.rows: Batch = {}  # name → [capacity, ...]
        self.keys = torch.zeros(0, dtype=torch.float64)  # [n] of the rows that are there
        self.n_seen = 0  # samples that ever arrived

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def labels(self) -> Tensor:
        """Classes of the stored samples, int64 [n]."""
        return self.rows["labels"][: len(self)] if self.rows else torch.zeros(0, dtype=torch.int64)

    def add(self, batch: Batch, generator: torch.Generator) -> None:
        """Let the samples of a batch compete for a place.

        Args:
            batch: rows [B, ...], unaugmented (`raw_rows`).
            generator: draws the keys.
        """
        new = torch.rand(len(batch["labels"]), generator=generator, dtype=torch.float64)
        self.n_seen += len(new)
        full = len(self) == self.capacity
        if full and self.policy == "reservoir":  # most of a long stream ends here, without a look at the rows
            candidates = (new < self.keys.max()).nonzero()[:, 0]
            if len(candidates) == 0:
                return
            batch, new = {k: v[candidates.to(v.device)] for k, v in batch.items()}, new[candidates]
        keys = torch.cat([self.keys, new])
        labels = torch.cat([self.labels.cpu(), batch["labels"].cpu()])
        stays = torch.zeros(len(keys), dtype=torch.bool)
        stays[torch.argsort(score(self.policy, keys, labels))[: self.capacity]] = True
        old, new_stay = stays[: len(self)], stays[len(self) :].nonzero()[:, 0]
        free = torch.cat([(~old).nonzero()[:, 0], torch.arange(len(self), self.capacity)])[: len(new_stay)]
        self.keys = torch.cat([self.keys, self.keys.new_zeros(min(self.capacity, len(keys)) - len(self))])
        self.keys[free] = new[new_stay]
        self._write(free, {k: v[new_stay.to(v.device)] for k, v in batch.items()})

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


def _same_length(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    length = max(a.shape[1], b.shape[1])
    pad = torch.nn.functional.pad
    return tuple(pad(x, (0, length - x.shape[1]), value=PADDING[name]) for x in (a, b))  # type: ignore[return-value]
