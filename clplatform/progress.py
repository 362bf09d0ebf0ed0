"""How far a sweep is: the records that its jobs leave, and a line whenever a job has begun or ended. Imports no torch.

A record is there from a job's beginning; until its end its problem is that the process ended without a word.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from clplatform.files import read_json, write_json
from clplatform.tracking.tables import duration

LOST = "its process ended without a word"
TOTAL = "sweep.json"  # in a sweep's folder: how many jobs the last call has
SECONDS = 1.0  # between two looks at the records


def record(run_dir: Path, settings: str) -> dict[str, Any]:
    """Of a job that begins now. `done`: was it complete already, so that its seconds say nothing?"""
    done = (run_dir / "report.html").exists()
    return {
        "run": str(run_dir), "settings": settings, "problem": LOST, "value": None, "begun": time.time(), "seconds": None,
        "done": done,
    }  # fmt: skip


def ended(begun: Mapping[str, Any], problem: str | None, value: float | None = None) -> dict[str, Any]:
    """The record of a job that ends now."""
    return {**begun, "problem": problem, "value": value, "seconds": time.time() - begun["begun"]}


def read_records(folder: Path) -> dict[int, dict[str, Any]]:
    """Number of the job → what it has left."""
    return {int(path.stem): read_json(path) for path in sorted(folder.glob("*.json"), key=lambda p: int(p.stem))}


def describe(records: Collection[Mapping[str, Any]], total: int) -> str:
    """`7 of 20 jobs complete, 2 running, 1 failed, about 4:10 min left`."""
    running = [r for r in records if r["problem"] == LOST]
    complete = sum(r["problem"] is None for r in records)
    failed = len(records) - len(running) - complete
    text = f"{complete} of {total} jobs complete, {len(running)} running, {failed} failed"
    took = [r["seconds"] for r in records if r["problem"] is None and not r["done"]]
    if not took or complete + failed == total:
        return text
    mean = sum(took) / len(took)
    left = time_left(mean, [mean - (time.time() - r["begun"]) for r in running], total - len(records))
    return f"{text}, about {duration(round(left))} left"


def time_left(mean: float, running: Collection[float], waiting: int) -> float:
    """Seconds, if those that wait take as long as the mean and as many go on at once as now.

    Args:
        running: seconds that each of those that are at it still needs.
    """
    return (sum(max(seconds, 0.0) for seconds in running) + max(waiting, 0) * mean) / max(len(running), 1)


class Announcer:
    """Says how far the jobs in other processes are."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total
        self.stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        counts: tuple[str | None, ...] = ()
        while not self.stopped.wait(SECONDS):
            records = read_records(self.folder).values()
            found = tuple(r["problem"] for r in records)
            if found != counts:
                counts = found
                print(describe(records, max(self.total, len(records))), flush=True)


def write_total(sweep: Path, total: int) -> None:
    sweep.mkdir(parents=True, exist_ok=True)
    write_json(sweep / TOTAL, {"jobs": total})


def read_total(sweep: Path) -> int:
    """0: not known."""
    return int(read_json(sweep / TOTAL)["jobs"]) if (sweep / TOTAL).exists() else 0
