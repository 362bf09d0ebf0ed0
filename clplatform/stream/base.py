"""The stream that experiences are read from; what all kinds of stream share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplatform.data import derive_seed
from clplatform.stream.augmentation import Augmentation
from clplatform.types import Batch, ClplatformError, Data, Experience, Scenario, StreamInfo


@dataclass
class InMemoryStream:
    """Experiences over tensors. `benchmark` is the same stream as an Avalanche benchmark.

    Args:
        info: metadata.
        experiences: in order.
        augmentation: of training batches; None: none.
        tokenizer: of a text stream.
        notes: facts for the report.
        texts: of streams whose answers are texts: what is read and what should be written (a text, or several that are as
            good), by sample id (`index`).
        offsets: of streams whose answers are spans of what is read: where each token begins and ends there, int64
            [N, T, 2], by sample id.
    """

    info: StreamInfo
    experiences: list[Experience]
    augmentation: Augmentation | None = None
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)
    texts: Sequence[tuple[str, str | list[str]]] = field(default_factory=list)
    offsets: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 2, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.experiences)

    def __getitem__(self, index: int) -> Experience:
        return self.experiences[index]

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    @property
    def augments(self) -> bool:
        return self.augmentation is not None

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A training batch with random augmentation."""
        return batch if self.augmentation is None else self.augmentation(batch, generator)

    @cached_property
    def benchmark(self) -> Any:
        """The Avalanche benchmark: made when asked for, because importing Avalanche takes seconds."""
        from clplatform.stream.avalanche import to_benchmark

        return to_benchmark(self)

    def save_assets(self, folder: Path) -> None:
        """The tokenizer, which prediction needs."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Plan:
    """Which classes each experience shows, in the stream's own numbering."""

    groups: list[list[int]]  # original classes of each experience
    number_of: Tensor  # [K] int64: original class → number in the stream, −1: not in the stream
    class_names: tuple[str, ...]  # by number


def plan_classes(
    names: Sequence[str],
    n_experiences: int,
    *,
    scenario: Scenario,
    seed: int | None,
    class_order: Sequence[int] | None,
    what: str,
) -> Plan:
    """Deal the classes to experiences.

    Args:
        names: of the original classes 0 … K−1.
        n_experiences: must divide the number of classes.
        seed: shuffles the order; None: the natural order.
        class_order: the order itself, as original classes.
        what: the stream's name, for messages.

    Raises:
        ClplatformError: the numbers do not fit.
    """
    order = resolve_order(len(names), seed, class_order, what)
    k = len(order)
    if n_experiences < 1 or n_experiences > k or k % n_experiences:
        fit = ", ".join(str(d) for d in range(1, k + 1) if k % d == 0)
        raise ClplatformError(
            f"stream.n_experiences={n_experiences}: the {k} classes of {what} cannot be dealt evenly to so many "
            f"experiences; possible are {fit}"
        )
    size = k // n_experiences
    groups = [order[i : i + size] for i in range(0, k, size)]
    return number_classes(groups, names, scenario)


def resolve_order(k: int, seed: int | None, class_order: Sequence[int] | None, what: str) -> list[int]:
    """The order in which original classes appear."""
    if class_order is not None:
        wrong = sorted(
            {c for c in class_order if not 0 <= c < k} | {c for c in class_order if class_order.count(c) > 1}
        )
        if wrong or not class_order:
            raise ClplatformError(
                f"stream.class_order={list(class_order)}: give each class of {what} at most once, 0 … {k - 1}"
                + (f" (wrong: {wrong})" if wrong else "")
            )
        return list(class_order)
    if seed is None:
        return list(range(k))
    generator = torch.Generator().manual_seed(derive_seed(seed, "class order"))
    return torch.randperm(k, generator=generator).tolist()


def number_classes(groups: list[list[int]], names: Sequence[str], scenario: Scenario) -> Plan:
    """Number classes in the order of appearance; in the domain-incremental scenario by their place within
    the experience (van de Ven & Tolias 2019)."""
    number_of = torch.full((len(names),), -1, dtype=torch.int64)
    if scenario != "domain_incremental":
        order = list(dict.fromkeys(c for group in groups for c in group))
        number_of[order] = torch.arange(len(order))
        return Plan(groups, number_of, tuple(names[c] for c in order))
    size = len(groups[0])
    dealt = [c for group in groups for c in group]
    twice = sorted({names[c] for c in dealt if dealt.count(c) > 1})
    if twice:
        raise ClplatformError(
            "stream.scenario=domain_incremental numbers a class by its place within its experience; more than one "
            f"experience has {', '.join(twice[:3])}"
        )
    if any(len(g) != size for g in groups):
        raise ClplatformError(
            "stream.scenario=domain_incremental needs as many classes in every experience; they have "
            f"{[len(g) for g in groups]}"
        )
    for group in groups:
        number_of[group] = torch.arange(size)
    label_names = tuple(" / ".join(names[g[i]] for g in groups) for i in range(size))
    return Plan(groups, number_of, label_names)


def split_validation(labels: Tensor, fraction: float, seed: int | None) -> tuple[Tensor, Tensor]:
    """Rows for training and for validation, stratified by class: int64 [n], int64 [m].

    Every class keeps at least one training sample; the split depends on the stream's seed only.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed or 0, "validation"))
    order = torch.randperm(len(labels), generator=generator)
    validation = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        rows = order[labels[order] == c]
        validation[rows[: min(round(fraction * len(rows)), len(rows) - 1)]] = True
    return (~validation).nonzero()[:, 0], validation.nonzero()[:, 0]


def split_test(groups: Tensor, fraction: float | None, seed: int | None, what: str) -> tuple[Tensor, Tensor]:
    """Rows for training and for the test where there is no test file, stratified: int64 [n], int64 [m]. The first row of each
    group is trained on, so that classes keep the order in which they appear; of two rows and more, one at least is tested on.

    Args:
        groups: int64 [N].

    Raises:
        ClplatformError: no fraction is given either, or it leaves nothing to test on.
    """
    if fraction is None:
        raise ClplatformError(
            "stream.test is missing: give a file, or stream.test_fraction=0.2 to hold some of stream.train out"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed or 0, "test"))
    order = torch.randperm(len(groups), generator=generator)
    held = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        rows = order[groups[order] == group]
        held[rows[rows > rows.min()][: max(1, round(fraction * len(rows)))]] = True
    if not held.any():
        raise ClplatformError(
            f"stream.test_fraction={fraction:g} of {what} leaves no sample to test on: give stream.test"
        )
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def check_one_test(test: object, fraction: float | None) -> None:
    """Refuse two ways of saying what is tested."""
    if test is not None and fraction is not None:
        raise ClplatformError(
            "stream.test_fraction holds samples out where there is no stream.test; leave one of them null"
        )


def task_label(scenario: Scenario, index: int) -> int:
    """Task ids are there in the task-incremental scenario only."""
    return index if scenario == "task_incremental" else 0


def make_experiences(
    parts: Sequence[Mapping[str, Data | None]],
    classes: Sequence[tuple[int, ...]],
    scenario: Scenario,
    names: Sequence[str] | None = None,
    task_labels: Sequence[int] | None = None,
    vocab_size: int = 0,
) -> list[Experience]:
    """Experiences from their data (`train`, `validation`, `test`) and classes; by default each is a task of its own.
    Where tokens are predicted there are no classes: `vocab_size` of them are seen from the start."""
    experiences, seen = [], vocab_size
    for i, (part, own) in enumerate(zip(parts, classes, strict=True)):
        seen = max(seen, *(c + 1 for c in own)) if own else seen
        train, test = part["train"], part["test"]
        assert train is not None
        assert test is not None
        experiences.append(
            Experience(
                index=i,
                name=names[i] if names else f"experience {i + 1}",
                task_label=task_label(scenario, i) if task_labels is None else task_labels[i],
                classes=own,
                n_seen_classes=seen,
                train=train,
                validation=part["validation"],
                test=test,
            )
        )
    return experiences
