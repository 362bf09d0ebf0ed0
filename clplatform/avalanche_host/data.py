"""Our batches, data and experiences as Avalanche shows them to its plugins, and their data loaders as ours.

Avalanche's mini-batch is a list [x, y, t] of tensors. An image is float [C, H, W] in 0 … 1. A text is one float
tensor [2, L] of `input_ids` and `attention_mask` (exact up to 2²⁴), padded to the stream's longest text: plugins
concatenate, index, store and move x, and a dict could not follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.benchmarks.scenarios.generic_scenario import CLStream
from torch import Tensor
from torch.nn import functional as F

from clplatform.data import derive_seed, trim
from clplatform.stream.avalanche import as_dataset
from clplatform.types import Batch, Data, ExperienceInfo, InputSpec, StreamInfo

# -- batches -----------------------------------------------------------------------------------------------------


def pack(batch: Batch, spec: InputSpec) -> Tensor:
    """The inputs of a batch as one tensor x [B, …]."""
    if spec.modality == "text":
        assert spec.max_length is not None
        x = torch.stack([batch["input_ids"], batch["attention_mask"]], dim=1).float()
        return F.pad(x, (0, spec.max_length - x.shape[2]))
    x = batch["pixel_values"]
    return x.float() / 255 if x.dtype == torch.uint8 else x


def unpack(x: Tensor, spec: InputSpec) -> Batch:
    """Inverse of `pack`; texts are cut to the longest of the batch."""
    if spec.modality == "text":
        x = x.long()
        return trim({"input_ids": x[:, 0], "attention_mask": x[:, 1]})
    return {"pixel_values": x}


def to_minibatch(batch: Batch, spec: InputSpec) -> list[Tensor]:
    """A batch as [x, y, t]."""
    return [pack(batch, spec), batch["labels"], batch["task_labels"]]


def to_batch(minibatch: list[Tensor], spec: InputSpec, source: int, before: Batch | None = None) -> Batch:
    """[x, y, t] as a batch. Rows that a plugin has added or brought are from `source` and have no index (−1).

    Args:
        before: the batch whose rows come first.
    """
    x, y, t = minibatch[0], minibatch[1], minibatch[-1]
    n_before = 0 if before is None else min(len(before["labels"]), len(y))
    index, origin = (torch.full((len(y),), value, device=y.device) for value in (-1, source))
    if before is not None:
        index[:n_before], origin[:n_before] = before["index"][:n_before], before["source"][:n_before]
    return {**unpack(x, spec), "labels": y.long(), "task_labels": t.long(), "index": index, "source": origin}


class Batches:
    """A plugin's data loader as batches of ours, in an order that is a function of (seed, epoch), so that training can
    stop and go on anywhere (see `clplatform.data.Loader`).

    Avalanche's loaders draw from the global generator: here from a state of their own.

    Args:
        minibatches: sized and iterable: [x, y, t] at a time.
        spec, source: see `to_batch`.
        seed: of the order.
    """

    def __init__(self, minibatches: Any, spec: InputSpec, source: int, seed: int) -> None:
        self.minibatches, self.spec, self.source, self.seed = minibatches, spec, source, seed
        self.epoch = 0
        self.offset = 0
        self._resumed = False

    def __len__(self) -> int:
        return len(self.minibatches)

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed and self.offset > 0:  # the last pass was broken off
            self.epoch, self.offset = self.epoch + 1, 0
        self._resumed = False
        done = self.offset
        for i, minibatch in enumerate(seeded(self.minibatches, derive_seed(self.seed, "epoch", self.epoch))):
            if i < done:
                continue
            last = i + 1 == len(self)
            self.epoch, self.offset = (self.epoch + 1, 0) if last else (self.epoch, self.offset + 1)
            yield to_batch(list(minibatch), self.spec, self.source)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "offset": self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.offset, self._resumed = state["epoch"], state["offset"], True


def seeded(iterable: Any, seed: int) -> Iterator[Any]:
    """The items of `iterable`, which draws from PyTorch's global generator as if it had been seeded with `seed`; who
    takes the items draws as if nobody had."""
    state = torch.Generator().manual_seed(seed).get_state()
    items: Iterator[Any] | None = None
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(state)
        try:
            items = iter(iterable) if items is None else items
            item = next(items)
        except StopIteration:
            return
        finally:
            state = torch.get_rng_state()
            torch.set_rng_state(outside)
        yield item


# -- data and experiences ----------------------------------------------------------------------------------------


class Packed:
    """Data whose inputs are packed: what `as_dataset` reads."""

    def __init__(self, data: Data, spec: InputSpec) -> None:
        self.data, self.spec = data, spec

    def __len__(self) -> int:
        return len(self.data)

    @property
    def labels(self) -> Tensor:
        return self.data.labels

    def fetch(self, rows: Tensor) -> Batch:
        batch = self.data.fetch(rows)
        return {"pixel_values": pack(batch, self.spec), "labels": batch["labels"]}


class HostedExperience(DatasetExperience):
    """An experience of ours as plugins see it, with what is known of classes and tasks.

    Args:
        info: of the stream.
        seen: the experiences so far, this one last.
        data: its samples.
        stream: name of the stream it is of.
    """

    def __init__(self, info: StreamInfo, seen: list[ExperienceInfo], data: Data, stream: str) -> None:
        now = seen[-1]
        dataset: Any = as_dataset(Packed(data, info.input), now.task_label, text=False)  # type: ignore[arg-type]
        super().__init__(dataset=dataset, current_experience=now.index)
        classes, k = set(now.classes), len(info.class_names)
        self.classes_in_this_experience = classes
        self.previous_classes = {c for e in seen[:-1] for c in e.classes}
        self.classes_seen_so_far = self.previous_classes | classes
        self.future_classes = set(range(k)) - self.classes_seen_so_far
        self.task_label, self.task_labels = now.task_label, [now.task_label]
        self.benchmark = SimpleNamespace(
            n_classes=k,
            n_classes_per_exp=list(info.classes_per_experience),
            classes_order=list(range(k)),  # classes are numbered in the order of appearance
        )
        self.origin_stream = CLStream(stream, [self], benchmark=self.benchmark, set_stream_info=False)  # type: ignore[arg-type]

    @property
    def dataset(self) -> Any:
        return self._dataset

    @dataset.setter
    def dataset(self, dataset: Any) -> None:  # BiC takes its validation samples out
        self._dataset = dataset
