"""Lightning's own file loggers beside `metrics.jsonl`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge
from pytorch_lightning.loggers import CSVLogger, Logger

from clplatform.tracking.logger import Row, RunContext, RunLogger
from clplatform.types import ClplatformError


class Csv:
    """`csv/version_<n>/metrics.csv`: a resumed run begins the next version, since Lightning overwrites files.

    Args:
        every_n_steps: steps between two logged training losses.
    """

    def __init__(self, *, every_n_steps: Annotated[int, Ge(1)]) -> None:
        self.every_n_steps = every_n_steps

    def loggers(self, run: RunContext) -> list[RunLogger]:
        return [Forward(run, lambda first: CSVLogger(str(run.run_dir), name="csv"))]


class TensorBoard:
    """Event files in `tensorboard/`; what a resumed run logs again replaces what was there.

    Args:
        every_n_steps: steps between two logged training losses.

    Raises:
        ClplatformError: tensorboard is not installed.
    """

    def __init__(self, *, every_n_steps: Annotated[int, Ge(1)]) -> None:
        if not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
            raise ClplatformError(
                "tracking=tensorboard needs the package tensorboard: install it (pip install tensorboard), "
                "or choose tracking=local"
            )
        self.every_n_steps = every_n_steps

    def loggers(self, run: RunContext) -> list[RunLogger]:
        def make(first: Row) -> Logger:
            from pytorch_lightning.loggers import TensorBoardLogger

            purge: dict[str, Any] = {"purge_step": first.step} if run.resume else {}
            return TensorBoardLogger(str(run.run_dir), name="tensorboard", version="", **purge)

        return [Forward(run, make)]


class Forward(RunLogger):
    """Hands rows to a Lightning logger, with the run's step as its step.

    Args:
        run: the run.
        make: first row → the logger.
    """

    def __init__(self, run: RunContext, make: Any) -> None:
        super().__init__(run)
        self.make, self.inner = make, None

    def write(self, row: Row) -> None:
        if self.inner is None:
            self.inner = self.make(row)
        values = {**row.metrics, "experience": row.experience, "epoch": row.epoch}
        self.inner.log_metrics(values, row.step)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        if self.inner is not None:
            self.inner.finalize("success" if status == "completed" else status)
            self.inner = None
