"""Reading a run directory. Whatever is missing or broken is said in `problems`; only `results.json` is required."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clplatform.metric.matrix import METRICS, summarize, to_array
from clplatform.types import ClplatformError

Matrix = list[list[float | None]]


@dataclass
class Run:
    """What a run directory holds. Every accessor has a neutral answer for what is missing."""

    folder: Path
    results: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    problems: list[str] = field(default_factory=list)

    def part(self, name: str) -> dict[str, Any]:
        """A dictionary inside `results.json` (`stream`, `backbone`, `cost`, …)."""
        value = self.results.get(name)
        return value if isinstance(value, dict) else {}

    def rows(self, name: str) -> list[Any]:
        """A list inside `results.json` (`timing`, `notes`, …)."""
        value = self.results.get(name)
        return value if isinstance(value, list) else []

    @cached_property
    def matrix(self) -> Matrix:
        """The accuracy matrix; empty where it is missing or broken (then it is among `problems`)."""
        try:
            values = to_array(self.results.get("matrix") or [])
        except (TypeError, ValueError) as error:
            self.problems.append(f"results.json: the accuracy matrix cannot be read ({error})")
            return []
        if not values.size:
            self.problems.append("results.json has no accuracy matrix yet")
        return [[number(value) for value in row] for row in values.tolist()]

    @property
    def n_experiences(self) -> int:
        names = self.part("stream").get("experience_names") or []
        return self.part("stream").get("n_experiences") or len(names) or (len(self.matrix[0]) if self.matrix else 0)

    @property
    def n_learned(self) -> int:
        return max(len(self.matrix) - 1, 0)

    @property
    def names(self) -> list[str]:
        """Names of the experiences, numbered from 1 where there are none."""
        names = [str(name) for name in self.part("stream").get("experience_names") or []]
        return names + [f"experience {i + 1}" for i in range(len(names), self.n_experiences)]

    @property
    def without_boundaries(self) -> str:
        """` without boundaries (10 % blurry)`; empty for a stream that says where tasks end."""
        share = number(self.part("stream").get("blurry"))
        return "" if share is None else f" without boundaries ({share:.0%} blurry)".replace("%", " %")

    @property
    def updates(self) -> str:
        """`, updated with march and april`; empty for a run that begins at the beginning."""
        names = [str(node.get("name")) for node in self.config.get("updates") or [] if isinstance(node, dict)]
        gone = ", the only data evaluated since" if self.config.get("remembered") else ""
        return f", updated with {' and '.join(names)}{gone}" if names else ""

    @property
    def strategy(self) -> str:
        return " + ".join(map(str, self.rows("strategy"))) or "unknown strategy"

    @property
    def tuning(self) -> str | None:
        """What is trained of the backbone (`lora`, …); None: all of it."""
        name = self.part("backbone").get("tuning")
        return name if isinstance(name, str) and name != "full" else None

    @property
    def status(self) -> str:
        """`completed`, `running`, `failed`, or `unknown`."""
        status = self.results.get("status")
        return status if status in ("completed", "running", "failed") else "unknown"

    @property
    def order_seed(self) -> int | None:
        """Seed of the class order; None where no seed decided it."""
        seed = self.part("stream").get("seed")
        return seed if isinstance(seed, int) and seed >= 0 else None

    @property
    def metric_name(self) -> str:
        return str(self.part("primary_metric").get("name") or "accuracy")

    @property
    def higher_is_better(self) -> bool:
        return self.part("primary_metric").get("higher_is_better", True) is not False

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """All metrics from the matrix; what the matrix alone cannot give (intransigence) as it was stored."""
        stored = self.part("metrics")
        computed = summarize(self.matrix, self.higher_is_better)
        return {m.name: computed[m.name] if computed[m.name] is not None else stored.get(m.name) for m in METRICS}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty where it is missing or broken."""
        import yaml

        try:
            values = yaml.load(self.config_text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            self.problems.append(f"the configuration is not YAML ({str(error).splitlines()[0]})")
            return {}
        return values if isinstance(values, dict) else {}

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        rows, broken = read_lines(self.folder / "metrics.jsonl")
        if rows is None:
            self.problems.append("metrics.jsonl is missing: no loss curves")
        elif broken:
            self.problems.append(f"metrics.jsonl: {broken} line{'s' if broken > 1 else ''} could not be read")
        return rows or []


def load_run(folder: Path) -> Run:
    """Read a run directory.

    Raises:
        ClplatformError: there is no `results.json`, or it is not the record of a run.
    """
    path = folder / "results.json"
    if not folder.exists():
        raise ClplatformError(f"{folder}: there is no such folder")
    if not path.is_file():
        raise ClplatformError(f"{folder} is not a run directory: it has no results.json")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClplatformError(f"{path} cannot be read: {error}") from None
    if not isinstance(results, dict) or not {"matrix", "stream", "strategy"} & set(results):
        raise ClplatformError(f"{path} is not the record of a clplatform run")
    run = Run(folder, results)
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        run.environment = environment if isinstance(environment, dict) else {}
    except (OSError, ValueError) as error:
        run.problems.append(f"environment.json cannot be read ({_reason(error)})")
    run.config_text = _config_text(run)
    return run


def _config_text(run: Run) -> str:
    """The resolved configuration, or else Hydra's own record of it (before interpolation)."""
    try:
        return (run.folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        run.problems.append(f"config.yaml cannot be read ({_reason(error)})")
    try:
        return (run.folder / ".hydra" / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def read_lines(path: Path) -> tuple[list[dict[str, Any]] | None, int]:
    """The objects of a JSON-lines file and how many lines are broken; None without the file.

    A killed run may leave half a line at the end: that one is no loss and not counted.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None, 0
    rows, broken = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            broken += bool(line.strip()) and number < len(lines)
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows, broken


# What stands beside runs and is no part of a comparison, unless it is asked for itself (clplatform.protocol).
AROUND = {"tuning", "references"}


def find_runs(path: Path) -> tuple[list[Path], list[Path]]:
    """Run directories at or below `path`, and folders of jobs that left no results.

    Raises:
        ClplatformError: there is no such folder.
    """
    if not path.exists():
        raise ClplatformError(f"{path}: there is no such folder")
    path = path.parent if path.name == "results.json" else path
    runs, empty = [], []
    for folder, folders, files in os.walk(path):
        if "results.json" in files:
            runs.append(Path(folder))
            folders.clear()  # what a run directory holds are no runs
        elif ".hydra" in folders:
            empty.append(Path(folder))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in AROUND)
    return runs, empty


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _reason(error: Exception) -> str:
    return "it is missing" if isinstance(error, FileNotFoundError) else str(error)


def trained_parameters(run: Run) -> float | None:
    """How many were trained at once at most, with the head; runs of before this was recorded: those of the backbone that its
    tuning leaves trainable, though the strategy may train fewer."""
    recorded = number(run.part("cost").get("trained_parameters"))
    return number(run.part("backbone").get("trainable_parameters")) if recorded is None else recorded
