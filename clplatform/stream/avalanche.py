"""The one door to Avalanche: our streams as its benchmarks, and its benchmarks as our streams."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from clplatform.data import concat
from clplatform.stream.augmentation import Kind, augmentation
from clplatform.stream.base import InMemoryStream, make_experiences, split_validation
from clplatform.stream.image_files import data_folder
from clplatform.stream.lazy import LazyImages, spec_of
from clplatform.types import ClplatformError, Data, Scenario, Stream, StreamInfo

TEXT = ("input_ids", "attention_mask")

# -- ours to theirs --------------------------------------------------------------------------------------------


def to_benchmark(stream: Stream) -> Any:
    """The stream as an Avalanche benchmark with streams `train`, `test` and, if there is one, `validation`.

    A sample is (x, y, t): an image as float [C, H, W] in 0 … 1 or a text as a dict of `input_ids` and
    `attention_mask` [T]; the class in our numbering; the task label. Experiences know their classes and task labels,
    as Avalanche's strategies and plugins expect.

    Raises:
        ClplatformError: the stream is not one of classes.
    """
    if stream.info.problem != "classification":
        raise ClplatformError(
            f"stream={stream.info.name} is {stream.info.problem}; an Avalanche benchmark is made of classification only"
        )
    splits = {s: [getattr(e, s) for e in stream] for s in ("train", "validation", "test")}
    text = stream.info.input.modality == "text"
    streams = {
        split: [as_dataset(d, e.task_label, text) for d, e in zip(data, stream, strict=True)]
        for split, data in splits.items()
        if all(d is not None for d in data)
    }
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(**streams)))


class Samples(Dataset):
    """Data one sample at a time, as Avalanche reads it: (x, y)."""

    def __init__(self, data: Data, text: bool) -> None:
        self.data, self.text = data, text

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        batch = self.data.fetch(torch.tensor([row]))
        y = int(batch["labels"])
        if self.text:
            return {name: batch[name][0] for name in TEXT}, y
        x = batch["pixel_values"][0]
        return (x.float() / 255 if x.dtype == torch.uint8 else x), y


def as_dataset(data: Data, task: int, text: bool) -> TaskAwareSupervisedClassificationDataset:
    """One experience's data as Avalanche's dataset of (x, y, t)."""
    return TaskAwareSupervisedClassificationDataset(
        [Samples(data, text)],
        data_attributes=[
            DataAttribute(data.labels.tolist(), "targets"),  # type: ignore[arg-type]
            DataAttribute(ConstantSequence(task, len(data)), "targets_task_labels", use_in_getitem=True),
        ],
        collate_fn=_collate_text if text else default_collate,
    )


def _collate_text(samples: Sequence[tuple[dict[str, Tensor], int, int]]) -> list[Any]:
    """Texts of different lengths, padded to the longest."""
    x = concat([{name: column[None] for name, column in sample[0].items()} for sample in samples])
    return [x, torch.tensor([s[1] for s in samples]), torch.tensor([s[2] for s in samples])]


# -- theirs to ours --------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One experience of one of Avalanche's streams, before its classes are numbered."""

    source: Any
    targets: Tensor  # int64 [N]
    tasks: Tensor  # int64 [N]

    @classmethod
    def of(cls, experience: Any) -> Part:
        dataset = experience.dataset.eval()  # the transforms that are not random
        targets = torch.as_tensor(list(dataset.targets), dtype=torch.int64)
        tasks = getattr(dataset, "targets_task_labels", None)
        return cls(dataset, targets, torch.zeros_like(targets) if tasks is None else torch.as_tensor(list(tasks)))


def from_benchmark(
    *,
    benchmark: Any,
    name: str = "avalanche",
    scenario: Scenario | None = None,
    data_dir: str | None = None,
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
    seed: Annotated[int, Ge(0)] | None = None,
    image_size: Annotated[int, Ge(1)] | None = None,
    in_memory: bool = True,
    augment: Kind = "none",
) -> InMemoryStream:
    """Any Avalanche benchmark of labelled images as a stream.

    Classes are numbered in the order of appearance. A test stream of one experience is dealt to the experiences by
    their classes. The benchmark's evaluation transforms are applied, its random training transforms are not: that is
    `augment`'s work, which leaves buffers the raw images.

    Args:
        benchmark: the benchmark, or a function that makes it.
        name: for reports.
        scenario: None: task-incremental where task labels differ, domain-incremental where all experiences have the
            same classes, else class-incremental.
        data_dir: folder given to the function as `dataset_root`; None: `$CLPLATFORM_DATA/<name>`, else Avalanche's own.
        validation_fraction: of the training data of each class, where the benchmark has no validation stream.
        seed: of the validation split.
        image_size: height and width that images are resized to; None: as they are.
        in_memory: read every image once; False: read images when a batch needs them (`num_workers` helps).
        augment: of training batches.

    Raises:
        ClplatformError: it cannot be made, holds no labelled images, or its streams do not fit together.
    """
    if callable(benchmark):
        benchmark = _make(benchmark, name, data_dir)
    train, test, validation = _parts(benchmark, name)
    scenario = scenario or infer_scenario(train)
    keys = [_keys(p, scenario) for p in train]
    numbering = _numbering(keys)
    tasks = _tasks(train) if scenario == "task_incremental" else [0] * len(train)
    single_test = len(train) > 1 and test[0] is test[1]
    parts, classes, size = [], [], (image_size, image_size) if image_size else None
    index = 0
    for i, part in enumerate(train):
        own = tuple(sorted({numbering[k] for k in keys[i].unique().tolist()}))
        split: dict[str, Any] = {"validation": None}
        for kind, p in (("train", part), ("test", test[i]), ("validation", validation[i] if validation else None)):
            if p is not None:
                labels = _number(_keys(p, scenario), numbering, name, i)
                split[kind] = _data(p.source, labels, tasks[i], index, size)
                index += len(labels)
        if single_test:
            chosen = torch.isin(split["test"].labels, torch.tensor(own)).nonzero()[:, 0]
            split["test"] = split["test"].select(chosen)
        if split["validation"] is None and validation_fraction > 0:
            kept, held_out = split_validation(split["train"].labels, validation_fraction, seed)
            split |= {"train": split["train"].select(kept), "validation": split["train"].select(held_out)}
        parts.append({k: d if d is None or not in_memory else d.load() for k, d in split.items()})
        classes.append(own)
    info = StreamInfo(
        name=name,
        scenario=scenario,
        problem="classification",
        n_experiences=len(parts),
        classes_per_experience=tuple(len(c) for c in classes),
        class_names=_class_names(numbering, scenario),
        seed=-1 if seed is None else seed,
        input=spec_of(parts[0]["train"], name),
        task_ids=scenario == "task_incremental",
    )
    return InMemoryStream(info, make_experiences(parts, classes, scenario, task_labels=tasks), augmentation(augment))


def _make(function: Callable[..., Any], name: str, data_dir: str | None) -> Any:
    folder = data_folder(name, data_dir)
    try:
        with patience():
            return function() if folder is None else function(dataset_root=folder)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ClplatformError(
            f"stream.benchmark: Avalanche cannot make it ({reason}); its data goes into stream.data_dir=<folder> or "
            f"$CLPLATFORM_DATA/{name}, its settings are stream.benchmark.*"
        ) from error


@contextmanager
def patience(seconds: float = 10.0) -> Iterator[None]:
    """Inside, a network that does not answer is an error after seconds, not minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _parts(benchmark: Any, name: str) -> tuple[list[Part], list[Part], list[Part] | None]:
    """Training, test and validation experiences, as many of each."""
    streams = getattr(benchmark, "streams", {})
    if not {"train", "test"} <= set(streams):
        raise ClplatformError(f"stream={name}: an Avalanche benchmark with train and test streams is needed")
    try:
        found = {s: [Part.of(e) for e in streams[s]] for s in streams if s in ("train", "test", "valid", "validation")}
    except (AttributeError, TypeError, ValueError) as error:
        raise ClplatformError(
            f"stream={name}: the benchmark's experiences hold no labelled samples ({error})"
        ) from None
    train, test, validation = found["train"], found["test"], found.get("validation", found.get("valid"))
    if len(test) == 1:
        test = test * len(train)
    for split, parts in (("test", test), ("validation", validation)):
        if parts is not None and len(parts) != len(train):
            raise ClplatformError(
                f"stream={name}: {len(train)} training experiences but {len(parts)} {split} experiences; "
                "as many are needed (or a single test experience)"
            )
    return train, test, validation


def infer_scenario(train: list[Part]) -> Scenario:
    """Which of the three scenarios the experiences form."""
    if len(torch.cat([p.tasks for p in train]).unique()) > 1:
        return "task_incremental"
    shown = {tuple(p.targets.unique().tolist()) for p in train}
    return "domain_incremental" if len(train) > 1 and len(shown) == 1 else "class_incremental"


# A class is told by its label, in task-incremental streams by task and label: one number for both.
_TASK = 1 << 32


def _keys(part: Part, scenario: Scenario) -> Tensor:
    return part.targets + (part.tasks * _TASK if scenario == "task_incremental" else 0)


def _numbering(keys: list[Tensor]) -> dict[int, int]:
    shown = [k.unique().tolist() for k in keys]  # sorted
    return {key: i for i, key in enumerate(dict.fromkeys(k for group in shown for k in group))}


def _number(keys: Tensor, numbering: dict[int, int], name: str, experience: int) -> Tensor:
    values, inverse = keys.unique(return_inverse=True)
    unknown = [v % _TASK for v in values.tolist() if v not in numbering]
    if unknown:
        raise ClplatformError(
            f"stream={name}: experience {experience + 1} is tested on labels that are never trained: {unknown[:5]}"
        )
    return torch.tensor([numbering[v] for v in values.tolist()], dtype=torch.int64)[inverse]


def _tasks(train: list[Part]) -> list[int]:
    """The task of each experience, numbered in the order of appearance; a task that comes back keeps its number."""
    labels = [p.tasks.unique().tolist() for p in train]
    for i, own in enumerate(labels):
        if len(own) != 1:
            raise ClplatformError(f"stream.benchmark: experience {i + 1} has several task labels: {own[:5]}")
    number = {t: n for n, t in enumerate(dict.fromkeys(own[0] for own in labels))}
    return [number[own[0]] for own in labels]


def _class_names(numbering: dict[int, int], scenario: Scenario) -> tuple[str, ...]:
    if scenario == "task_incremental":
        return tuple(f"task {key // _TASK}: {key % _TASK}" for key in numbering)
    return tuple(str(key) for key in numbering)


def _data(source: Any, labels: Tensor, task: int, first: int, size: tuple[int, int] | None) -> LazyImages:
    columns = {
        "labels": labels,
        "task_labels": torch.full_like(labels, task),
        "index": torch.arange(first, first + len(labels)),
    }
    return LazyImages(source, columns, size=size)
