"""The stability gap: what earlier experiences lose, and often find again, while the next one is being learned.

An evaluation after the end of each experience does not see it. With `evaluate_every: n` every experience so far is also
evaluated after every n-th optimizer step of the run (De Lange, van de Ven & Tuytelaars 2023, "Continual Evaluation for
Lifelong Learning: Identifying the Stability Gap"), into `continual_evaluation.jsonl`, one line each; the measures
(`metric.continual`) go into `results.json`.

Nothing here changes the run: the model is looked at in eval mode, and random states and the count of operations are put back.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl

from clplatform.diagnosis.layers import some
from clplatform.evaluate import MEASURES, has_meaning
from clplatform.learner import Learner
from clplatform.metric.continual import Row, in_order, measures
from clplatform.random_state import random_state, set_random_state
from clplatform.results import Results
from clplatform.tracking.observe import accumulating
from clplatform.types import Experience, ExperienceInfo, Stream

FILE = "continual_evaluation.jsonl"


class ContinualEvaluation:
    """Evaluates while the run goes on: an observer of the experiment, told of every batch too.

    Args:
        every: optimizer steps of the run between two evaluations.
        samples: of each experience's test data; None: all.
        stream, results, run_dir: the run's.
        batch_size: of evaluation.
    """

    def __init__(
        self, *, every: int, samples: int | None, stream: Stream, results: Results, run_dir: Path, batch_size: int
    ) -> None:
        self.every, self.samples, self.stream, self.results = every, samples, stream, results
        self.path, self.batch_size = run_dir / FILE, batch_size
        self.tests = [
            e.test if samples is None else some(e.test, samples, e.index, "continual evaluation") for e in stream
        ]
        self._done = -1  # the last step that was evaluated
        self._seconds = 0.0  # since the end of the last experience
        if not results.matrix:  # a new run in a folder where another was
            self.path.unlink(missing_ok=True)
        elif self.path.is_file():
            if not self.path.read_bytes().endswith(b"\n"):  # half a line of a killed run
                with self.path.open("a") as file:
                    file.write("\n")
            self._measure()

    def start_experience(self, experience: Experience, learner: Learner, epochs: int) -> None: ...

    def after_batch(self, trainer: pl.Trainer, learner: Learner, batch_idx: int) -> None:
        """After the strategies have seen the batch."""
        if learner.steps % self.every or learner.steps == self._done or accumulating(trainer, batch_idx):
            return
        self._done = learner.steps
        assert learner.experience is not None
        self._write(learner, learner.experience.index, end=False)

    def finish_experience(self, info: ExperienceInfo | None, results: Results, learner: Learner) -> None:
        """Once more as it is evaluated at the end, consolidated; then the measures."""
        if info is None:
            return
        self._write(learner, info.index, end=True)
        self._measure()

    def _measure(self) -> None:
        """The record's measures anew, from what has been evaluated so far."""
        seconds = self.results.continual_evaluation.get("seconds", 0.0) + self._seconds
        self._seconds = 0.0
        self.results.continual_evaluation = {
            "every": self.every,
            "samples": self.samples,
            "seconds": seconds,
            **measures(rows_of(self.path), self.results.primary_metric["higher_is_better"]),
        }

    def _write(self, learner: Learner, index: int, *, end: bool) -> None:
        start, state, rows = time.perf_counter(), random_state(learner.generator), dict(learner.flops.rows)
        try:
            scores = [self._score(learner, i) for i in range(index + 1)]
        finally:
            set_random_state(state, learner.generator)
            learner.flops.rows = rows
        row = {"step": learner.steps, "experience": index, "end": end, "scores": scores}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._seconds += time.perf_counter() - start

    def _score(self, learner: Learner, index: int) -> float | None:
        if len(self.tests[index]) == 0 or not has_meaning(learner, self.stream[index]):
            return None
        measure = MEASURES[self.stream.info.problem]
        return measure(learner, self.stream, self.tests[index], self.batch_size)[self.stream.info.primary_metric]


def rows_of(path: Path) -> list[Row]:
    """The lines of the file, in order; half a line at the end of a killed run is left out."""
    rows = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return in_order(rows)
