"""The tracker: everything that is logged goes through here, once, to all loggers of the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from clplatform.tracking.local import LocalLogger
from clplatform.tracking.logger import EVALUATION, Matrix, Row, RunContext, RunLogger, TrackingPage, scalars


class Tracker:
    """Fans out to `metrics.jsonl` and the loggers of the chosen `tracking` page. A context: leaving it closes them.

    In a multi-process run only the first process logs. A failing disk stops the local record with one message
    on stderr; results and checkpoints have their own, louder, failures.

    Args:
        run_dir: the run directory.
        config: the resolved configuration.
        settings: the page, built (`Local`, `Wandb`, …).
        run_id: identity of the run, stored before the first fit; a resumed run keeps it.
        resume: the run goes on where it stopped.
        experience_names: for tables.
        metric, higher_is_better: what the matrix holds.
        matrix: of a resumed run, what it measured before it stopped.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        settings: TrackingPage,
        *,
        run_id: str,
        resume: bool = False,
        experience_names: Sequence[str] = (),
        metric: str = "accuracy",
        higher_is_better: bool = True,
        matrix: Matrix | None = None,
    ) -> None:
        names, known = tuple(experience_names), [] if matrix is None else matrix
        run = RunContext(run_dir, config, run_id, resume, names, metric, higher_is_better, known)
        self.every_n_steps = settings.every_n_steps
        first_process = getattr(rank_zero_only, "rank", 0) in (0, None)
        self._loggers: list[RunLogger] = [LocalLogger(run), *settings.loggers(run)] if first_process else []
        self._last = (0, 0, 0)  # step, experience, epoch

    @property
    def loggers(self) -> list[RunLogger]:
        """Lightning loggers, the same for every Trainer of the run; empty in processes that do not log."""
        return list(self._loggers)

    def start_stage(self, *, first_step: int, experience: int, stage: str) -> None:
        """A fresh Trainer begins at step `first_step` of the run (only needed where Trainers get `loggers`)."""
        for logger in self._loggers:
            logger.start_stage(first_step=first_step, experience=experience, stage=stage)

    def log(self, metrics: Mapping[str, Any], *, step: int, experience: int, epoch: int, stage: str) -> None:
        """Log scalars.

        Args:
            metrics: name → number or 0-dimensional tensor (all tensors are fetched in one synchronisation).
            step: optimizer steps of the whole run so far.
            experience: 1 is the first.
            epoch: of this stage, 0 is the first.
            stage: its name.
        """
        if not self._loggers:
            return
        self._last = step, experience, epoch
        row = Row(step, experience, epoch, stage, scalars(metrics))
        for logger in list(self._loggers):
            self._guard(logger, "write", row)

    def log_experience(
        self,
        index: int,
        row: Sequence[float | None],
        metrics: Mapping[str, float | None],
        matrix: Matrix,
        *,
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Log what was measured after an experience, under `evaluation/…`.

        Args:
            index: the experience, 1 is the first; 0: before any training.
            row: the matrix's new row; None where a cell has no meaning (left out).
            metrics: average accuracy and the like; None is left out.
            matrix: all rows so far.
            step: optimizer steps of the whole run so far; None: as logged last.
            epoch: in which the experience's training ended; None: as logged last.
        """
        if not self._loggers:
            return
        values = {f"evaluation/{name}": value for name, value in metrics.items() if value is not None}
        values |= {f"evaluation/experience_{j}": v for j, v in enumerate(row, start=1) if v is not None}
        last_step, _, last_epoch = self._last
        at, epoch = (last_step if step is None else step), (last_epoch if epoch is None else epoch)
        logged = Row(at, index, epoch if index else 0, EVALUATION, scalars(values))
        for logger in list(self._loggers):
            self._guard(logger, "write_matrix", [list(r) for r in matrix], logged)

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """Close the loggers; calling it again does nothing.

        Args:
            status: `completed`, `failed` or `stopped`.
            summary: final metrics and costs.
        """
        loggers, self._loggers = self._loggers, []
        for logger in loggers:
            self._guard(logger, "close", status, summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is None or not issubclass(kind, Exception)
        self.finish("stopped" if stopped else "failed", {})

    def _guard(self, logger: RunLogger, method: str, *arguments: Any) -> None:
        try:
            getattr(logger, method)(*arguments)
        except Exception as error:
            if logger in self._loggers:
                self._loggers.remove(logger)
            print(
                f"clplatform: {logger.name} failed and logs no more ({type(error).__name__}: {error}); "
                f"the run goes on. Is {logger.save_dir} writable, and is there room on its disk?",
                file=sys.stderr,
            )
