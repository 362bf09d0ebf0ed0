"""`metrics.jsonl`: every logged scalar of a run, one JSON object per line. This is the record; W&B mirrors it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any

from annotated_types import Ge

from clplatform.files import atomic_write
from clplatform.tracking.logger import EVALUATION, Row, RunContext, RunLogger

FILE = "metrics.jsonl"
FIELDS = ("time", "step", "experience", "epoch", "stage")
NON_FINITE = "non_finite"


class Local:
    """`metrics.jsonl` in the run directory, which every page has, and nothing else.

    Args:
        every_n_steps: steps between two logged training losses.
    """

    def __init__(self, *, every_n_steps: Annotated[int, Ge(1)]) -> None:
        self.every_n_steps = every_n_steps

    def loggers(self, run: RunContext) -> list[RunLogger]:
        return []


class LocalLogger(RunLogger):
    """Appends rows to `metrics.jsonl`; a killed process loses at most the line it was writing.

    JSON has no NaN and no infinities: such a value is null, and the row's `non_finite` says which it was
    (`{"train/loss": null, "non_finite": {"train/loss": "NaN"}}`; "NaN", "Infinity" or "-Infinity", all of which
    `float()` reads). Rows without one have no `non_finite`.

    A resumed run goes on in the same file. Rows at or beyond the first one that it logs again are dropped
    before, so the file looks as if the run had never stopped.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self.path = run.run_dir / FILE
        self._file: IO[str] | None = None

    def write(self, row: Row) -> None:
        if self._file is None:
            if self._is_known_start(row):
                return
            self._file = self._open(row)
        self._file.write(to_line(row))

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_known_start(self, row: Row) -> bool:
        """Is this the evaluation before any training, again? It does not tell where training goes on: a run that
        stopped inside its first experience repeats it and then continues in the middle."""
        known = self.run.resume and row.experience == 0 and self.path.exists()
        return known and any(r.experience == 0 for r in read(self.path))

    def _open(self, first: Row) -> IO[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.run.resume and self.path.exists():
            # Not at the checkpoint's step: only the first row logged again tells where training really went on.
            drop_from(self.path, first)
        return self.path.open("a", encoding="utf-8", buffering=1)


def to_line(row: Row) -> str:
    """The row as one line of JSON."""
    values: dict[str, Any] = {name: getattr(row, name) for name in FIELDS}
    values |= {name: value if math.isfinite(value) else None for name, value in row.metrics.items()}
    if odd := {name: _spell(value) for name, value in row.metrics.items() if not math.isfinite(value)}:
        values[NON_FINITE] = odd
    return json.dumps(values, allow_nan=False) + "\n"


def read(path: Path) -> Iterator[Row]:
    """The rows of a `metrics.jsonl`; a last line that was cut off is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None
        place = {name: values.pop(name) for name in FIELDS}
        values |= values.pop(NON_FINITE, {})
        yield Row(**place, metrics={name: float(value) for name, value in values.items()})


def drop_from(path: Path, first: Row) -> None:
    """Remove the rows at or beyond `first`, and a last line that was cut off."""
    kept = [row for row in read(path) if _order(row) < _order(first)]
    atomic_write(path, "".join(map(to_line, kept)).encode())


def _order(row: Row) -> tuple[int, int, int]:
    # At the same step: the training losses, then validation, then the evaluation that ends the experience.
    validation = any(name.startswith("validation/") for name in row.metrics)
    rank = 2 if row.stage == EVALUATION else 1 if validation else 0
    return row.step, row.experience, rank


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
