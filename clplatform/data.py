"""Data held in memory as tensors and fetched a batch at a time, and the loader that orders it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clplatform.types import IGNORED, Batch, Data, Output

Transform = Callable[[Batch], Batch]

# Columns [B, T] of text, and what fills them up to the longest sample of a batch. `input_ids` is filled
# with zeros: whatever the tokenizer's padding id, `attention_mask` says that nobody looks there.
PADDING = {
    "input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "original_ids": 0, "decoder_input_ids": 0,
    "decoder_attention_mask": 0, "answerable": 0, "labels": IGNORED,
}  # fmt: skip


def trim(batch: Batch) -> Batch:
    """Cut text columns [B, T] to the longest sample of the batch: of what is read, and of what is written."""
    if "attention_mask" not in batch:
        return batch
    written = ("decoder_input_ids", "decoder_attention_mask")
    if "decoder_attention_mask" in batch:
        batch = _cut(batch, "decoder_attention_mask", (*written, "labels"))
        return _cut(batch, "attention_mask", [n for n in PADDING if n not in (*written, "labels")])
    return _cut(batch, "attention_mask", PADDING)


def _cut(batch: Batch, mask: str, names: Iterable[str]) -> Batch:
    """Columns `names` cut to the longest row of `mask`."""
    length = int(batch[mask].sum(1).max()) if len(batch[mask]) else 0
    if length == batch[mask].shape[1]:
        return batch
    return {n: value[:, :length] if n in names and value.ndim == 2 else value for n, value in batch.items()}


def predicted(batch: Batch, values: Tensor) -> Tensor:
    """What belongs to the predictions of a batch, one row for each: of tokens [B, T, …] those that have a label [N, …];
    where a sample has one label, `values` [B, …] as they are."""
    labels = batch["labels"]
    return values if labels.ndim == 1 else values[labels != IGNORED]


def concat(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches along the first dimension; text is padded to the longest.

    Only columns that all batches have are kept.
    """
    if len(batches) == 1:
        return batches[0]
    names = [name for name in batches[0] if all(name in b for b in batches)]
    return {name: _concat_column(name, [b[name] for b in batches]) for name in names}


def _concat_column(name: str, values: list[Tensor]) -> Tensor:
    if name in PADDING and values[0].ndim == 2:
        length = max(v.shape[1] for v in values)
        values = [torch.nn.functional.pad(v, (0, length - v.shape[1]), value=PADDING[name]) for v in values]
    return torch.cat(values)


def join(outputs: Sequence[Output], order: Tensor) -> Output:
    """One output of those of parts of a batch.

    Args:
        order: where each row of the whole is in the parts one after the other, int64 [B].
    """
    logits, features = (torch.cat([getattr(part, name) for part in outputs])[order] for name in ("logits", "features"))
    written = [part.tokens for part in outputs if part.tokens is not None]
    tokens = _concat_column("input_ids", written)[order] if written else None
    return Output(logits, features, tokens)


class TensorData(Dataset):
    """Columns of equal length, fetched a batch at a time.

    A subset shares the columns of what it was selected from. `transform` is a deterministic, batched
    function applied to every fetched batch (a permutation of pixels, a rotation), so that ten
    permuted copies of a data set cost the memory of one.

    Text columns (`input_ids`, `attention_mask`) are stored padded to the longest sample and cut to
    the longest of the batch when fetched.

    Args:
        columns: name → tensor [N, ...]; `labels`, `task_labels` and `index` (all int64 [N]) among them.
        rows: int64 [n], positions in the columns; all of them by default.
    """

    def __init__(
        self, columns: Mapping[str, Tensor], *, rows: Tensor | None = None, transform: Transform | None = None
    ) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        missing = {"labels", "task_labels", "index"} - set(columns)
        if missing:
            raise ValueError(f"columns lack {sorted(missing)}")
        self.columns = dict(columns)
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.columns["labels"]) if self.rows is None else len(self.rows)

    def column(self, name: str) -> Tensor:
        """One whole column of the selected rows, untransformed."""
        column = self.columns[name]
        return column if self.rows is None else column[self.rows]

    @property
    def labels(self) -> Tensor:
        return self.column("labels")

    def fetch(self, rows: Tensor) -> Batch:
        """The samples at positions `rows` [B] as a batch, with `source` = 0."""
        if self.rows is not None:
            rows = self.rows[rows]
        batch = trim({name: column[rows] for name, column in self.columns.items()})
        batch["source"] = torch.zeros(len(rows), dtype=torch.int64)
        return batch if self.transform is None else self.transform(batch)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.fetch(torch.tensor([row])).items()}

    def __getitems__(self, rows: list[int]) -> Batch:
        return self.fetch(torch.as_tensor(rows))

    def select(self, rows: Tensor) -> TensorData:
        base = rows if self.rows is None else self.rows[rows]
        return TensorData(self.columns, rows=base, transform=self.transform)

    def __add__(self, other: Data) -> ConcatData:  # type: ignore[override]
        return ConcatData([self, other])


class ConcatData(Dataset):
    """Several data one after another.

    Args:
        rows: int64 [n], positions in the concatenation; all of them by default.
    """

    def __init__(self, parts: list[Data], *, rows: Tensor | None = None) -> None:
        self.parts: list[Data] = []
        for p in parts:
            self.parts += p.parts if isinstance(p, ConcatData) and p.rows is None else [p]
        self.starts = torch.tensor([0, *[len(p) for p in self.parts]]).cumsum(0)
        self.rows = rows

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.rows is None else len(self.rows)

    @property
    def labels(self) -> Tensor:
        labels = torch.cat([p.labels for p in self.parts])
        return labels if self.rows is None else labels[self.rows]

    def fetch(self, rows: Tensor) -> Batch:
        if self.rows is not None:
            rows = self.rows[rows]
        part_of_row = torch.searchsorted(self.starts, rows, right=True) - 1
        order = torch.argsort(part_of_row, stable=True)
        batches = []
        for i in part_of_row.unique().tolist():
            batches.append(self.parts[i].fetch(rows[part_of_row == i] - self.starts[i]))
        batch = concat(batches)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        return {name: value[inverse] for name, value in batch.items()}

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.fetch(torch.tensor([row])).items()}

    def __getitems__(self, rows: list[int]) -> Batch:
        return self.fetch(torch.as_tensor(rows))

    def select(self, rows: Tensor) -> ConcatData:
        return ConcatData(self.parts, rows=rows if self.rows is None else self.rows[rows])

    def __add__(self, other: Data) -> ConcatData:  # type: ignore[override]
        return ConcatData([self, other])


def lengths(data: Data) -> Tensor | None:
    """Tokens of every sample, read and written, int64 [N]; None: not of texts, or not held as tensors."""
    if isinstance(data, ConcatData):
        parts = [lengths(part) for part in data.parts]
        if any(part is None for part in parts):
            return None
        whole = torch.cat([part for part in parts if part is not None])
        return whole if data.rows is None else whole[data.rows]
    if not isinstance(data, TensorData) or "attention_mask" not in data.columns:
        return None
    names = [n for n in ("attention_mask", "decoder_attention_mask") if n in data.columns]
    return torch.stack([data.column(n).sum(1) for n in names]).sum(0)


def by_length(data: Data) -> tuple[Data, Tensor]:
    """Texts from the shortest to the longest, so that batches hold little padding; everything else as it is.

    Returns:
        The data, and the positions int64 [N] at which the samples of the original order are in it.
    """
    n, own = len(data), lengths(data)
    if own is None or isinstance(data, ConcatData):
        return data, torch.arange(n)
    order = own.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(n)
    return data.select(order), back


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts` (so that no stream of random numbers is shared)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


WINDOW = 50  # batches that are sorted by length together


class Loader:
    """Batches in an order that is a pure function of (seed, epoch), so that training can stop and go on anywhere.

    Args:
        data: what to load.
        batch_size: samples in a batch.
        shuffle: a new order every epoch; otherwise the order of the data.
        seed: see `derive_seed`.
        drop_last: leave out a last batch that is smaller.
        bucket: of texts, batches of about the same length, so that little is padding; only with `shuffle`.
        num_workers: processes that fetch (for data that does not fit in memory); 0: fetch here.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        bucket: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.data, self.batch_size, self.shuffle, self.seed = data, batch_size, shuffle, seed
        self.lengths = lengths(data) if bucket else None
        self.drop_last, self.num_workers = drop_last, num_workers
        self.epoch = 0
        self.offset = 0  # batches of this epoch that are already done
        self._resumed = False

    def __len__(self) -> int:
        n = len(self.data)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Positions of all samples in the order of this epoch, int64 [N]."""
        if not self.shuffle:
            return torch.arange(len(self.data))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        order = torch.randperm(len(self.data), generator=generator)
        if self.lengths is None:
            return order
        # Sorted by length within windows of many batches; then the batches are shuffled, but for a smaller last one.
        windows = order.split(WINDOW * self.batch_size)
        order = torch.cat([w[self.lengths[w].argsort(stable=True)] for w in windows])
        n = len(order) // self.batch_size
        whole = order[: n * self.batch_size].view(n, self.batch_size)
        return torch.cat([whole[torch.randperm(n, generator=generator)].flatten(), order[n * self.batch_size :]])

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed and self.offset > 0:  # the last pass was broken off
            self.epoch, self.offset = self.epoch + 1, 0
        self._resumed = False
        batches = list(self.order(self.epoch).split(self.batch_size))[: len(self)][self.offset :]
        for i, batch in enumerate(self._fetch(batches)):
            # Before yielding: a trainer may take the last batch and never ask for another.
            last = i == len(batches) - 1
            self.epoch, self.offset = (self.epoch + 1, 0) if last else (self.epoch, self.offset + 1)
            yield batch

    def _fetch(self, batches: list[Tensor]) -> Iterator[Batch]:
        if self.num_workers == 0:
            return map(self.data.fetch, batches)
        return iter(
            DataLoader(
                self.data,  # type: ignore[arg-type]
                batch_sampler=[b.tolist() for b in batches],
                collate_fn=_same,
                num_workers=self.num_workers,
                # A generator of its own: the base seed of the workers must not be drawn from the global one.
                generator=torch.Generator().manual_seed(derive_seed(self.seed, "workers", self.epoch)),
            )
        )

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "offset": self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.offset, self._resumed = state["epoch"], state["offset"], True


def _same(batch: Any) -> Any:
    return batch
