"""No logging at all."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from clplatform.tracking.logger import RunContext, RunLogger


class Off:
    """Logs nothing: `results.json` is all that is left of the run's course.

    Args:
        every_n_steps: as in the other pages; has no effect here.
    """

    def __init__(self, *, every_n_steps: Annotated[int, Ge(1)]) -> None:
        self.every_n_steps = every_n_steps

    def loggers(self, run: RunContext) -> list[RunLogger]:
        return []
