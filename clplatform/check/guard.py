"""Data that knows who may read it, so that a look at the future, at test data or at samples kept in secret is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from clplatform.data import ConcatData
from clplatform.types import Batch, Data, Experience

Part = tuple[int, str]  # experience, split


@dataclass
class Guard:
    """What may be read now, and what was read all the same."""

    allowed: set[Part] | None = None  # None: everything
    violations: list[str] = field(default_factory=list)

    @contextmanager
    def only(self, allowed: set[Part] | None) -> Iterator[None]:
        """Inside, only these parts may be read."""
        before, self.allowed = self.allowed, allowed
        try:
            yield
        finally:
            self.allowed = before

    def read(self, part: Part, what: str) -> None:
        if self.allowed is not None and part not in self.allowed:
            index, split = part
            self.violations.append(f"{what} of the {split} split of experience {index + 1}")

    def over(self, experience: Experience) -> Experience:
        """The same experience, guarded."""
        splits = {s: GuardedData(getattr(experience, s), (experience.index, s), self) for s in ("train", "test")}
        if experience.validation is not None:
            splits["validation"] = GuardedData(experience.validation, (experience.index, "validation"), self)
        return replace(experience, **splits)


def guarded(experiment: Any, *, past: bool) -> Guard:
    """Let an experiment that is not begun learn what it may read only.

    Args:
        past: may earlier experiences' training data be read?

    Returns:
        The guard, which knows afterwards what was read all the same.
    """
    guard, learn, evaluate = Guard(), experiment._learn, experiment._evaluate
    experiment.stream.experiences = [guard.over(e) for e in experiment.stream.experiences]

    def learn_guarded(experience: Any, **how: Any) -> None:
        train = {(i, "train") for i in range(experience.index + 1) if past or i == experience.index}
        with guard.only(train | {(experience.index, "validation")}):
            learn(experience, **how)

    def evaluate_guarded() -> None:
        with guard.only(None):
            evaluate()

    experiment._learn, experiment._evaluate = learn_guarded, evaluate_guarded
    return guard


class GuardedData:
    """`Data` that tells its guard when it is read."""

    def __init__(self, data: Data, part: Part, guard: Guard) -> None:
        self.data, self.part, self.guard = data, part, guard

    def __len__(self) -> int:
        return len(self.data)

    @property
    def labels(self) -> Tensor:
        self.guard.read(self.part, "labels")
        return self.data.labels

    def fetch(self, rows: Tensor) -> Batch:
        self.guard.read(self.part, "samples")
        return self.data.fetch(rows)

    def select(self, rows: Tensor) -> GuardedData:
        return GuardedData(self.data.select(rows), self.part, self.guard)

    def __add__(self, other: Any) -> ConcatData:
        return ConcatData([self, other])
