"""How long a run still takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from clplatform.tracking.tables import duration


@dataclass
class Pace:
    """How long the run still takes, from what is finished.

    Args:
        n_experiences: of the stream.
        clock: seconds that only grow.
    """

    n_experiences: int
    clock: Callable[[], float] = time.monotonic
    n_steps: int = 0  # of the current experience: batches of all its stages and epochs
    step: int = 0
    index: int = 0
    _start: float = 0.0
    _first_batch: float | None = None
    _first_step: int = 0
    _finished: list[float] = field(default_factory=list)

    def resume(self, seconds: Sequence[float]) -> None:
        """What the experiences that were finished before the run stopped have taken."""
        self._finished = list(seconds)

    def start_experience(self, index: int, n_steps: int) -> None:
        """An experience of about `n_steps` batches begins."""
        self.index, self.n_steps, self.step = index, n_steps, 0
        self._start, self._first_batch = self.clock(), None

    def start_stage(self, n_steps: int, done: int) -> None:
        """A stage of `n_steps` batches begins, or goes on when `done` of them were done before the run stopped."""
        self.n_steps = max(self.n_steps, self.step + n_steps)  # more than expected: data of earlier experiences
        self.step += done

    def count_step(self) -> None:
        self.step += 1
        if self._first_batch is None:  # what precedes the first batch is no pace of training
            self._first_batch, self._first_step = self.clock(), self.step

    def finish_experience(self) -> float:
        """Seconds the experience took."""
        seconds = self.clock() - self._start
        self._finished.append(seconds)
        return seconds

    def seconds_left(self) -> float | None:
        """An estimate for the whole run; None while there is nothing to go by."""
        done = self.step - self._first_step
        if self._first_batch is None or done < 1:
            return None
        per_step = (self.clock() - self._first_batch) / done
        rest = max(self.n_steps - self.step, 0) * per_step
        whole = sum(self._finished) / len(self._finished) if self._finished else self.n_steps * per_step
        return rest + (self.n_experiences - self.index - 1) * whole


def left_text(seconds: float) -> str:
    """Coarse on purpose: an estimate with decimals claims too much."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    return duration(round(seconds))
