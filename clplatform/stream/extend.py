"""A stream that goes on: experiences of another one come after its own (`clplatform update`).

What the model has learned keeps its numbers. A class that is known by its name is that class; the others are new ones, in the
order in which the addition shows them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clplatform.data import TensorData
from clplatform.files import read_json
from clplatform.stream.base import InMemoryStream
from clplatform.stream.lazy import LazyImages
from clplatform.stream.tokenizer import load_tokenizer
from clplatform.types import IGNORED, ClplatformError, Data, Experience, ExperienceInfo, StreamInfo


def extend(stream: InMemoryStream, addition: InMemoryStream) -> InMemoryStream:
    """The experiences of `stream`, then those of `addition`, as experiences of the first one's scenario and with the second one's
    augmentation.

    Raises:
        ClplatformError: they do not fit: another problem, another input, or classes that the scenario has no room for.
    """
    info, more = stream.info, addition.info
    _check(info, more)
    names = list(info.class_names)
    names += [name for name in more.class_names if name not in names]
    number = torch.tensor([names.index(name) for name in more.class_names], dtype=torch.int64)
    first = len(stream.texts)
    experiences, seen = list(stream.experiences), stream.experiences[-1].n_seen_classes
    for new in addition.experiences:
        place = len(experiences)
        classes = tuple(sorted(number[list(new.classes)].tolist()))
        seen = max(seen, *(c + 1 for c in classes)) if classes else seen
        task = 1 + max(e.task_label for e in experiences) if info.task_ids else 0  # a task may have come back
        # Where texts belong to samples, ids are their places there; else they only have to differ from all others.
        start = first if stream.texts or addition.texts else place << 36
        splits = {
            split: _moved(data, number if info.has_classes else None, task, start)
            for split in ("train", "validation", "test")
            if (data := getattr(new, split)) is not None
        }
        experiences.append(
            Experience(
                index=place,
                name=_unused(
                    more.name if len(addition) == 1 else f"{more.name}: {new.name}", [e.name for e in experiences]
                ),
                task_label=task,
                classes=classes,
                n_seen_classes=seen,
                is_boundary=info.boundaries,
                train=splits["train"],
                validation=splits.get("validation"),
                test=splits["test"],
            )
        )
    return replace(
        stream,
        info=replace(
            info,
            n_experiences=len(experiences),
            classes_per_experience=tuple(len(e.classes) for e in experiences),
            class_names=tuple(names),
        ),
        experiences=experiences,
        augmentation=addition.augmentation,
        notes=[*stream.notes, *addition.notes],
        texts=[*stream.texts, *addition.texts],
        offsets=_offsets(stream.offsets, addition.offsets),
    )


def _check(info: StreamInfo, more: StreamInfo) -> None:
    for what in ("problem", "primary_metric"):
        ours, theirs = getattr(info, what), getattr(more, what)
        if ours != theirs:
            raise ClplatformError(f"the new data are {what.replace('_', ' ')} {theirs}, and the run's are {ours}")
    shape, other = (info.input.shape, more.input.shape)
    if shape != other:
        raise ClplatformError(f"the new images are {_size(other)}, and the run's are {_size(shape)}")
    unknown = [name for name in more.class_names if name not in info.class_names]
    if unknown and info.scenario == "domain_incremental" and info.has_classes:
        known = ", ".join(map(repr, info.class_names[:5])) + (", …" if len(info.class_names) > 5 else "")
        raise ClplatformError(
            f"the new data have the class {unknown[0]!r}; stream={info.name} is domain_incremental, whose experiences all have "
            f"the same classes ({known})"
        )


def _size(shape: tuple[int, int, int] | None) -> str:
    return "none" if shape is None else f"{shape[1]}×{shape[2]} with {shape[0]} channel{'s' * (shape[0] > 1)}"


def _unused(name: str, names: list[str]) -> str:
    """The name, with a number where another experience has it."""
    found, n = name, 2
    while found in names:
        found, n = f"{name} ({n})", n + 1
    return found


def _moved(data: Any, number: Tensor | None, task: int, first: int) -> Data:
    """The data with classes by their numbers here, its task, and ids from `first` on.

    Args:
        number: int64 [K], class there → class here; None: labels are no classes.
    """
    columns = dict(data.columns)
    labels = columns["labels"]
    if number is not None:
        labels = torch.where(labels == IGNORED, labels, number[labels.clamp_min(0)])
    columns |= {
        "labels": labels,
        "task_labels": torch.full_like(columns["task_labels"], task),
        "index": columns["index"] + first,
    }
    if "question" in columns:  # it is an id too
        columns["question"] = columns["question"] + first
    if isinstance(data, LazyImages):
        return LazyImages(data.source, columns, size=data.size, rows=data.rows)
    return TensorData(columns, rows=data.rows, transform=data.transform)


def _offsets(ours: Tensor, theirs: Tensor) -> Tensor:
    """int64 [N + M, T, 2], by sample id."""
    n = max(ours.shape[1], theirs.shape[1])
    return torch.cat([F.pad(o, (0, 0, 0, n - o.shape[1])) for o in (ours, theirs)])


def remembered(folder: Path, *, pretrained: bool) -> InMemoryStream:
    """The stream that a saved model has learned, of which nothing is left but what the model's folder says of it: its
    experiences have no samples.

    Args:
        pretrained: has the tokenizer come with the backbone?

    Raises:
        ClplatformError: there is no such folder any more.
    """
    if not (folder / "clplatform.json").is_file():
        raise ClplatformError(
            f"the run was updated without earlier data, from the model {folder}, which is not there; with "
            "--without-earlier-data its own model is taken"
        )
    saved = read_json(folder / "clplatform.json")
    info = StreamInfo.from_dict(saved["stream"])
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = TensorData({"labels": nothing, "task_labels": nothing, "index": nothing})
    experiences = [
        Experience(**vars(ExperienceInfo.from_dict(values)), train=empty, validation=None, test=empty)
        for values in saved["experiences"]
    ]
    note = (
        "the data of earlier experiences are not there: the model is not evaluated on them again, and averages are of the new "
        "ones only"
    )
    tokenizer: Any = None
    if info.input.modality == "text":
        tokenizer = load_tokenizer(folder)
        tokenizer.decoder_start = info.input.bos_token_id if pretrained and info.problem == "seq2seq" else None
    return InMemoryStream(info, experiences, tokenizer=tokenizer, notes=[note])
