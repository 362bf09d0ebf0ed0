"""One row of logged scalars, and the base of everything that rows are written to."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

Matrix = list[list[float | None]]
EVALUATION = "evaluation"  # the stage of a row that holds one row of the matrix and the metrics so far


@dataclass(frozen=True)
class Row:
    """Scalars logged at one moment. `step`: optimizer steps of the whole run; `experience`: 1 is the first
    (0: before any training); `epoch`: 0 is the first, of this stage."""

    step: int
    experience: int
    epoch: int
    stage: str
    metrics: dict[str, float]
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class RunContext:
    """What a logger may want to know of the run it belongs to."""

    run_dir: Path
    config: dict[str, Any]
    run_id: str
    resume: bool = False
    experience_names: tuple[str, ...] = ()
    metric: str = "accuracy"
    higher_is_better: bool = True
    matrix: Matrix = field(default_factory=list)  # of a resumed run: what it measured before it stopped


class TrackingPage(Protocol):
    """What a page of `conf/tracking` builds: settings that make the loggers of a run."""

    every_n_steps: int  # steps between two logged training losses

    def loggers(self, run: RunContext) -> list[RunLogger]:
        """What is logged to beside `metrics.jsonl`, which every run has."""
        ...


class RunLogger(Logger):
    """A Lightning logger that lives as long as the run: every stage's fresh Trainer may share it.

    The platform calls `write`, `write_matrix` and `close`. What Lightning or a callback logs through a
    Trainer arrives in `log_metrics`, where that Trainer's step becomes the run's.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__()
        self.run = run
        self.place = Row(step=0, experience=0, epoch=0, stage="main", metrics={}, time=0.0)

    def write(self, row: Row) -> None:
        """Log one row."""
        raise NotImplementedError

    def write_matrix(self, matrix: Matrix, row: Row) -> None:
        """The matrix so far (row 0: before any training), and its newest row with the metrics as scalars."""
        self.write(row)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """The end of the run: `completed`, `failed` or `stopped`; then nothing more is logged."""

    # -- Lightning's side ---------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def version(self) -> str:
        return self.run.run_id

    @property
    def save_dir(self) -> str:
        return str(self.run.run_dir)

    def start_stage(self, *, first_step: int, experience: int, stage: str) -> None:
        """A new Trainer starts to count its steps at 0: that is step `first_step` of the run."""
        self.place = Row(step=first_step, experience=experience, epoch=0, stage=stage, metrics={}, time=0.0)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = dict(metrics)
        epoch = int(values.pop("epoch", self.place.epoch))
        at = self.place.step + (step or 0)
        self.write(Row(at, self.place.experience, epoch, self.place.stage, scalars(values)))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's configuration is known already."""


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers and 0-dimensional tensors as floats, with one transfer (one synchronisation) per device.

    Raises:
        ValueError: a value is neither.
    """
    values: dict[str, Any] = dict(metrics)
    devices: dict[Any, list[str]] = {}
    for name, value in values.items():
        if hasattr(value, "detach"):
            if value.numel() != 1:
                raise ValueError(
                    f"{name}: only single numbers can be logged, not a tensor of shape {list(value.shape)}"
                )
            devices.setdefault(value.device, []).append(name)
    for names in devices.values():
        import torch

        stacked = torch.stack([values[name].detach().reshape(()).float() for name in names])
        values.update(zip(names, stacked.tolist(), strict=True))
    return {name: float(value) for name, value in values.items()}


def finite(value: float | None) -> bool:
    """Is it a number that can be drawn?"""
    return value is not None and math.isfinite(value)
