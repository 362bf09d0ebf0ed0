"""From labelled texts to a stream: who sees which texts, what is held out, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplatform.data import TensorData
from clplatform.stream.base import InMemoryStream, Plan, make_experiences, split_test, split_validation, task_label
from clplatform.stream.text_augmentation import Augment, text_augmentation
from clplatform.stream.text_files import Texts
from clplatform.stream.tokenizer import tokenize, train_wordpiece, unknown
from clplatform.types import ClplatformError, InputSpec, Scenario, StreamInfo

Rows = dict[str, list[Tensor]]  # split → for each experience its rows in the split's texts, int64 [n]


@dataclass
class Source:
    """Labelled texts of the three splits; `validation` None: taken off the training texts.

    Args:
        class_names: the labels of the training texts, in their original numbering.
        notes: facts for the report.

    Raises:
        ClplatformError: a label of another split is never trained on, or two splits are one file.
    """

    train: Texts
    validation: Texts | None
    test: Texts
    class_names: list[str]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        known, splits = set(self.class_names), self.splits()
        for name, texts in splits.items():
            for i, label in enumerate(texts.labels):
                if label not in known:
                    raise ClplatformError(f"{texts.where(i)}: the label {label!r} is not among the training labels")
            for other in list(splits)[: list(splits).index(name)]:
                if Path(texts.path).resolve() == Path(splits[other].path).resolve():
                    raise ClplatformError(f"{texts.path} is both the {other} and the {name} split: give two")
                if both := len(set(texts.texts) & set(splits[other].texts)):
                    self.notes.append(f"texts that are in the {other} and in the {name} split: {both}")

    def splits(self) -> dict[str, Texts]:
        """Those that there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: texts for name, texts in named.items() if texts is not None}

    def originals(self, split: str) -> Tensor:
        """Original class of every text, int64 [N]."""
        number = {name: i for i, name in enumerate(self.class_names)}
        return torch.tensor([number[label] for label in self.splits()[split].labels])


def hold_out_test(texts: Texts, fraction: float | None, seed: int | None) -> tuple[Texts, Texts]:
    """The texts that are trained on, and those that are tested on: a fraction of each label's, in each experience that the file
    names."""
    own = list(zip(texts.experiences or texts.labels, texts.labels, strict=True))
    number = {pair: i for i, pair in enumerate(dict.fromkeys(own))}
    kept, held = split_test(torch.tensor([number[pair] for pair in own]), fraction, seed, texts.path)
    return texts.select(kept.tolist(), texts.path), texts.select(held.tolist(), f"{texts.path} (held out)")


def make_source(train: Texts, validation: Texts | None, test: Texts) -> Source:
    """Number the labels in the order of the training texts."""
    return Source(train, validation, test, list(dict.fromkeys(train.labels)))


def text_stream(
    name: str, source: Source, plan: Plan, scenario: Scenario, *, seed: int | None, validation_fraction: float,
    max_length: int, vocab_size: int, tokenizer: Any, augment: Augment = None, titles: Sequence[str] | None = None,
    by_title: bool = False,
) -> InMemoryStream:  # fmt: skip
    """Give each experience its texts, and tokenize them.

    Args:
        augment: see `clplatform.stream.text_augmentation`.
        titles: names of the experiences; None: their classes, where these are few.
        by_title: an experience has the texts that name it, instead of those of its classes.
    """
    rows = _rows(source, plan, titles if by_title else None)
    columns = _targets(source, plan, rows, scenario)
    if source.validation is None and validation_fraction > 0:
        _hold_out(rows, source.originals("train"), validation_fraction, seed)
    notes = [*source.notes, *_gaps(source, plan, rows)]
    if tokenizer is None:
        tokenizer = train_wordpiece([source.train.joined(i) for i in rows["train"][0].tolist()], vocab_size)
        notes.append(
            f"WordPiece tokenizer with {len(tokenizer)} tokens trained on the first experience's training texts"
        )
    for split, tokens in _tokens(source, tokenizer, max_length, notes).items():
        columns[split] |= tokens
    columns.setdefault("validation", columns["train"])  # which it is held out from
    parts = []
    for i in range(len(plan.groups)):
        part: dict[str, TensorData | None] = {s: TensorData(columns[s], rows=rows[s][i]) for s in rows}
        if not len(part.get("validation") or ()):
            part["validation"] = None
        parts.append(part)
    classes = [tuple(sorted(set(plan.number_of[g].tolist()))) for g in plan.groups]
    info = StreamInfo(
        name=name,
        scenario=scenario,
        problem="classification",
        n_experiences=len(parts),
        classes_per_experience=tuple(len(c) for c in classes),
        class_names=plan.class_names,
        seed=-1 if seed is None else seed,
        input=InputSpec("text", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_length=max_length),
        task_ids=scenario == "task_incremental",
    )
    names = titles or [
        ", ".join(source.class_names[k] for k in group) if len(group) <= 3 else f"experience {i + 1}"
        for i, group in enumerate(plan.groups)
    ]
    augmentation = text_augmentation(augment, tokenizer)
    return InMemoryStream(info, make_experiences(parts, classes, scenario, names), augmentation, tokenizer, notes)


def _rows(source: Source, plan: Plan, titles: Sequence[str] | None) -> Rows:
    """The texts of each experience: of its classes, or those that name it."""
    if titles is None:
        return {
            split: [torch.isin(source.originals(split), torch.tensor(g)).nonzero()[:, 0] for g in plan.groups]
            for split in source.splits()
        }
    place = {title: i for i, title in enumerate(titles)}
    places = {s: torch.tensor([place[t] for t in texts.experiences or []]) for s, texts in source.splits().items()}
    return {split: [(at == i).nonzero()[:, 0] for i in range(len(titles))] for split, at in places.items()}


def _hold_out(rows: Rows, originals: Tensor, fraction: float, seed: int | None) -> None:
    """Move a part of each experience's training texts to validation, stratified by class."""
    splits = [split_validation(originals[own], fraction, seed) for own in rows["train"]]
    rows["validation"] = [own[out] for own, (_, out) in zip(rows["train"], splits, strict=True)]
    rows["train"] = [own[kept] for own, (kept, _) in zip(rows["train"], splits, strict=True)]


def _gaps(source: Source, plan: Plan, rows: Rows) -> list[str]:
    """What the report must say is not there."""
    notes = []
    absent = [k for k, number in enumerate(plan.number_of.tolist()) if number < 0]
    if absent:
        n = sum(int(torch.isin(source.originals(split), torch.tensor(absent)).sum()) for split in source.splits())
        notes.append(f"stream.class_order leaves out {len(absent)} of {len(plan.number_of)} classes with {n} texts")
    for split, what in {"validation": "are not validated", "test": "have no accuracy"}.items():
        empty = [str(i + 1) for i, own in enumerate(rows.get(split, [])) if not len(own)]
        if empty:
            notes.append(f"no {split} texts in the experiences {', '.join(empty)}: they {what}")
    return notes


def _targets(source: Source, plan: Plan, rows: Rows, scenario: Scenario) -> dict[str, dict[str, Tensor]]:
    """Labels, task labels and sample ids of every split's texts, int64 [N]; the ids are unique over all of them."""
    targets: dict[str, dict[str, Tensor]] = {}
    start = 0
    for split in source.splits():
        labels = plan.number_of[source.originals(split)]
        tasks = torch.zeros_like(labels)
        for i, own in enumerate(rows[split]):
            tasks[own] = task_label(scenario, i)
        targets[split] = {
            "labels": labels,
            "task_labels": tasks,
            "index": torch.arange(start, start + len(labels)),
        }
        start += len(labels)
    return targets


def _tokens(source: Source, tokenizer: Any, max_length: int, notes: list[str]) -> dict[str, dict[str, Tensor]]:
    """`input_ids` and `attention_mask` of every split's texts."""
    tokens = {}
    for split, texts in source.splits().items():
        tokens[split], cut = tokenize(tokenizer, texts.texts, max_length)
        if cut:
            notes.append(f"{cut} of {len(texts.texts)} {split} texts are cut to stream.max_length={max_length} tokens")
        notes += unknown(tokenizer, **tokens[split], what=f"{split} texts")
    return tokens
