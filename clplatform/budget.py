"""What an experience may cost, the same for every strategy: so many optimizer steps, samples, floating-point operations or
seconds in place of epochs.

The budget of an experience is shared by its stages, in proportion to the batches that they would take by their epochs: a
budget of half the steps halves every stage. A stage ends at the first optimizer step at which its part is used, so an
experience goes over its budget by less than one step (of `steps` by none). What counts is training, from
`before_experience` to the end of the last stage; what is done after it (Fisher information, a memory) is in the cost of the
run, and no part of the budget.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytorch_lightning as pl

from clplatform.types import ClplatformError

if TYPE_CHECKING:
    from clplatform.learner import Learner

Unit = Literal["steps", "samples", "flops", "seconds"]
UNITS: tuple[Unit, ...] = get_args(Unit)
# Settings of the trainer that end a stage too.
ENDS = ("max_steps", "max_time", "min_steps", "min_epochs", "fast_dev_run")
SCHEDULE = "clplatform.schedule.schedule"
# Sums of floats may differ in their last digit when a run was resumed: what is so near the limit has reached it.
NEAR = 1e-9


@dataclass(frozen=True)
class Allowance:
    """What a stage may use.

    Args:
        unit: what is counted.
        first, last: count of the whole run at which the stage begins and ends, if no stage before it went over its part.
        begin, value: count at which the experience began, and its budget.
    """

    unit: Unit
    first: float
    last: float
    begin: float
    value: float

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the stage; 0: not known."""
        return int(self.last - self.first) if self.unit == "steps" else 0

    def is_used(self, learner: Learner) -> bool:
        return spent(learner, self.unit) >= self.last * (1 - NEAR)

    def progress(self, learner: Learner) -> float:
        """How much of the stage's part is used, 0 … 1."""
        if self.last <= self.first:
            return 1.0
        return min(max((spent(learner, self.unit) - self.first) / (self.last - self.first), 0.0), 1.0)

    def share(self, learner: Learner) -> float:
        """How much of the experience's budget is used, 0 … 1."""
        return min((spent(learner, self.unit) - self.begin) / self.value, 1.0)


@dataclass(frozen=True)
class Budget:
    """So much for each experience.

    Args:
        unit: what is counted.
        value: of it.
    """

    unit: Unit
    value: float

    def allowances(self, begin: float, planned: Sequence[int]) -> list[Allowance]:
        """A part for every stage.

        Args:
            begin: count of the whole run when the experience began.
            planned: batches that each stage would take by its epochs.
        """
        total, found, before = sum(planned), [], 0
        for n in planned:
            ends = [self.value * part / total if total else 0.0 for part in (before, before + n)]
            if self.unit == "steps":
                ends = [float(round(end)) for end in ends]
            found.append(Allowance(self.unit, begin + ends[0], begin + ends[1], begin, self.value))
            before += n
        return found


def spent(learner: Learner, unit: Unit) -> float:
    """What the whole run has used so far."""
    if unit == "flops":
        return learner.flops.now(learner.backbone)
    return float({"steps": learner.steps, "samples": learner.samples, "seconds": learner.seconds}[unit])


def counted(learner: Learner, unit: Unit) -> float:
    """The same at the last checkpoint or end of an experience: without operations that are not measured yet."""
    return learner.flops.total if unit == "flops" else spent(learner, unit)


class Spending(pl.Callback):
    """Stops a stage when its allowance is used. The clock runs during training steps, and not while between them something
    is logged, evaluated or saved.

    Args:
        allowance: of the stage.
        epochs: that it would take without a budget: after so many it also stops when an epoch has used nothing (a strategy
            that trains on features it has kept uses no operations of the backbone).
    """

    def __init__(self, allowance: Allowance, epochs: int) -> None:
        self.allowance, self.epochs = allowance, epochs
        self.since, self.at_start = 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.since, self.at_start = time.perf_counter(), spent(pl_module, self.allowance.unit)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.at_start = spent(pl_module, self.allowance.unit)

    def after_batch(self, trainer: pl.Trainer, learner: Learner, batch_idx: int) -> None:
        """To be called before anything else happens after the batch."""
        learner.seconds += time.perf_counter() - self.since
        last = batch_idx + 1 >= trainer.num_training_batches
        if not last and (batch_idx + 1) % trainer.accumulate_grad_batches != 0:
            return
        idle = (
            last and trainer.current_epoch + 1 >= self.epochs and spent(learner, self.allowance.unit) == self.at_start
        )
        if idle or self.allowance.is_used(learner):
            trainer.should_stop = True

    def go_on(self) -> None:
        """To be called when everything is done that happens between two batches."""
        self.since = time.perf_counter()


# -- settings ----------------------------------------------------------------------------------------------------------


def build_budget(config: dict[str, Any]) -> Budget | None:
    """The budget that a checked configuration asks for; None: epochs."""
    given = config.get("budget") or {}
    return next((Budget(unit, float(given[unit])) for unit in UNITS if given.get(unit) is not None), None)


def budget_of(config: dict[str, Any]) -> dict[str, Any]:
    """For the record of a run: `unit`, `value`, `bytes`, as far as they are given."""
    budget, most = build_budget(config), (config.get("budget") or {}).get("bytes")
    found: dict[str, Any] = {"unit": budget.unit, "value": budget.value} if budget is not None else {}
    return found | ({"bytes": most} if most is not None else {})


def check_budget(config: dict[str, Any]) -> None:
    """Refuse a budget that cannot be kept to.

    Raises:
        ClplatformError: what is wrong, and what to do.
    """
    given = [unit for unit in UNITS if (config.get("budget") or {}).get(unit) is not None]
    if not given:
        return
    name = f"budget.{given[0]}={config['budget'][given[0]]:g}"
    if len(given) > 1:
        raise ClplatformError(f"{name} and budget.{given[1]} both say when an experience ends: give one of them")
    if config.get("early_stopping") is not None:
        raise ClplatformError(
            f"{name} says when an experience ends, and so does early_stopping={config['early_stopping']}: give one of them"
        )
    for key in ENDS:
        if config["trainer"].get(key) not in (None, False, -1):
            raise ClplatformError(f"{name} says when an experience ends, and so does trainer.{key}: leave it out")
    if given[0] != "steps" and config["scheduler"].get("_target_") != SCHEDULE:
        raise ClplatformError(
            f"{name}: the number of steps is not known beforehand, and only scheduler=constant, linear or cosine can follow "
            "what is used; choose one of them, or give budget.steps"
        )
