"""Which budget runs had in common, and what each has really used."""

from __future__ import annotations

from collections.abc import Sequence

from clplatform.report.format import scientific, size
from clplatform.report.run import Run, number

UNITS = {"steps": "optimizer steps", "samples": "samples", "flops": "FLOPs", "seconds": "seconds of training"}


def budget(run: Run) -> str:
    """`500 optimizer steps for each experience, 1.0 MB beside the model`; empty for a run on epochs."""
    part, found = run.part("budget"), []
    unit, value, most = str(part.get("unit", "")), number(part.get("value")), number(part.get("bytes"))
    if unit in UNITS and value is not None:
        found.append(f"{amount(unit, value)} for each experience")
    if most is not None:
        found.append(f"at most {size(most)} beside the model")
    return ", ".join(found)


def used(runs: Sequence[Run]) -> str:
    """What an experience has used on average over these runs: `500 optimizer steps`; empty where it is not recorded."""
    unit = str(runs[0].part("budget").get("unit", ""))
    values = [v for run in runs for v in map(number, run.part("budget").get("used") or []) if v is not None]
    return amount(unit, sum(values) / len(values)) if unit in UNITS and values else ""


def kept(run: Run) -> float:
    """Bytes that the strategies of a run keep beside the model at its end: samples, and four for each extra parameter."""
    cost = run.part("cost")
    return (number(cost.get("buffer_bytes")) or 0) + 4 * (number(cost.get("extra_parameters")) or 0)


def facts(run: Run) -> list[tuple[str, str]]:
    """The budget and what was used of it, for the head of a report."""
    if not budget(run):
        return []
    parts = [used([run])] if used([run]) else []
    if number(run.part("budget").get("bytes")) is not None and run.part("cost"):
        parts.append(size(kept(run)))
    capacity = run.part("budget").get("capacity")
    room = [f"{name}: {n} samples" for name, n in capacity.items()] if isinstance(capacity, dict) else []
    return [("Budget", budget(run)), *([("Used", ", ".join([*parts, *room]))] if parts or room else [])]


def amount(unit: str, value: float) -> str:
    number = scientific(value) if unit == "flops" else f"{value:.4g}" if unit == "seconds" else f"{value:,.0f}"
    return f"{number} {UNITS[unit]}"
