"""`results.json` and `accuracy_matrix.csv`: the record of a run, written atomically after every experience."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clplatform.files import atomic_write, read_json, write_json
from clplatform.metric.matrix import summarize
from clplatform.metric.score import SCORES

SCHEMA_VERSION = 1

Matrix = list[list[float | None]]


@dataclass
class Results:
    """What a run has measured so far. `matrix[i][j]`: the primary metric on experience j (0-based) after
    training on i experiences (row 0: before any training); None where it has no meaning."""

    run_id: str
    seed: int
    stream: dict[str, Any]
    backbone: dict[str, Any]
    strategy: list[str]
    primary_metric: dict[str, Any]
    code: dict[str, Any]
    status: str = "running"
    error: dict[str, str] | None = None
    matrix: Matrix = field(default_factory=list)
    validation_matrix: Matrix = field(default_factory=list)  # the same on the validation split: for selection
    scores: dict[str, Matrix] = field(default_factory=dict)  # other scores than the primary metric, as `matrix`
    # after each row: what the model writes for a few test samples of the experiences seen so far
    samples: list[list[dict[str, Any]]] = field(default_factory=list)
    timing: list[dict[str, float]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    kept_bytes: list[int] = field(default_factory=list)  # beside the model, after each experience
    confusion: list[list[int]] | None = None  # after the last experience: rows true, columns predicted
    notes: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)  # of `protocol=tune_first`: what was tried and chosen
    references: dict[str, Any] = field(default_factory=dict)  # matrices `joint` and `independent`, row `untrained`
    continual_evaluation: dict[str, Any] = field(default_factory=dict)  # of `evaluate_every`: min_acc, wc_acc, ...
    budget: dict[str, Any] = field(
        default_factory=dict
    )  # `unit`, `value`, `used` by each experience; `bytes`, `capacity`
    prompting: dict[str, list[float | None]] = field(
        default_factory=dict
    )  # of `prompting`: accuracies, as `matrix` has rows
    schema_version: int = SCHEMA_VERSION

    def widen(self, stream: dict[str, Any]) -> None:
        """Make room for experiences that have come after those of the record, of which nothing is measured yet.

        Args:
            stream: what the record says of the longer stream.
        """
        more = [None] * (stream["n_experiences"] - self.stream["n_experiences"])
        for matrix in (self.matrix, self.validation_matrix, *self.scores.values()):
            matrix[:] = [[*row, *more] for row in matrix]
        learned = self.stream.get("samples", {})  # of which the data may be gone
        samples = {split: [*own, *stream["samples"][split][len(own) :]] for split, own in learned.items()}
        self.stream = {**stream, "samples": samples} if samples else stream

    @property
    def metrics(self) -> dict[str, float | None]:
        known = {name: self.references.get(name) for name in ("joint", "independent", "untrained")}
        return summarize(self.matrix, self.primary_metric["higher_is_better"], **known)

    @property
    def score_metrics(self) -> dict[str, dict[str, float | None]]:
        """The same of the other scores."""
        return {name: summarize(matrix, SCORES[name].higher_is_better) for name, matrix in self.scores.items()}

    def save(self, folder: Path) -> None:
        """Write `results.json`, and every matrix as CSV: the primary metric's is `accuracy_matrix.csv`, whatever it is."""
        values = {
            "schema_version": self.schema_version,
            **asdict(self),
            "metrics": self.metrics,
            "score_metrics": self.score_metrics,
        }
        write_json(folder / "results.json", values)
        for name, matrix in {"accuracy": self.matrix, **self.scores}.items():
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["after", *self.stream["experience_names"]])
            for i, row in enumerate(matrix):
                writer.writerow([i, *("" if value is None else repr(value) for value in row)])
            atomic_write(folder / f"{name}_matrix.csv", text.getvalue().encode())

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read `results.json` of a run directory."""
        values = read_json(folder / "results.json")
        values.pop("metrics", None)
        values.pop("score_metrics", None)
        return cls(**values)
