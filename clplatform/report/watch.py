"""`clplatform report PATH --watch`: how a run, or a sweep, goes on in another process. It reads what they write, and imports no torch.

A run writes `results.json` after each experience (the old file or the new, never a half) and `metrics.jsonl` all the time.
A sweep has ended when none of its runs is going on and its comparison is newer than all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clplatform.metric.score import is_share
from clplatform.progress import read_total, time_left
from clplatform.report.format import NONE, metric_value
from clplatform.report.run import Run, find_runs, load_run, number
from clplatform.tracking.tables import duration, print_matrix, tolerate
from clplatform.types import ClplatformError

SECONDS = 1.0  # between two looks
SETTLED = 60.0  # seconds after which runs that are all complete are taken for all there will be
TAIL = 1 << 16  # bytes at the end of metrics.jsonl in which the last losses are looked for
COLOURS = {"completed": "green", "running": "cyan", "failed": "red", "starting": "dim"}


@dataclass(frozen=True)
class View:
    """One look. `key` changes when there is something new to say on a terminal without live display."""

    shown: RenderableType
    ended: bool
    failed: bool
    key: object


def watch(path: Path, console: Console | None = None, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show a run, or all runs below a folder, until they have ended. Returns the exit code: 1 if one failed.

    Raises:
        ClplatformError: there is no such folder, or nothing in it.
    """
    path, console = Path(path), tolerate(console or Console())
    look = _looker(path, console)
    view = look()
    if console.is_terminal and not view.ended:
        with Live(view.shown, console=console, auto_refresh=False, transient=True) as live:
            while not view.ended:
                sleep(SECONDS)
                view = look()
                live.update(view.shown, refresh=True)
    told = None
    while not view.ended:  # no terminal: a look whenever an experience has been learned
        if view.key != told:
            console.print(view.shown)
            told = view.key
        sleep(SECONDS)
        view = look()
    console.print(view.shown)
    return int(view.failed)


def _looker(path: Path, console: Console) -> Callable[[], View]:
    """What to call for each look; one that finds a file that cannot be read now repeats the last one."""
    runs, empty = find_runs(path)
    if not runs and not empty:
        raise ClplatformError(f"no runs in {path}: a run directory has a results.json")
    single = path.parent if path.is_file() else path
    alone = single.resolve() in [p.resolve() for p in (*runs, *empty)]
    last: list[View] = []

    def look() -> View:
        try:
            view = run_view(single, console) if alone else sweep_view(path)
        except ClplatformError:
            if not last:
                raise
            return last[0]
        last[:] = [view]
        return view

    return look


# -- one run -----------------------------------------------------------------------------------------------------------


def run_view(folder: Path, console: Console) -> View:
    """The matrix so far, the last losses, and the time left."""
    if not (folder / "results.json").exists():
        return View(Text(f"{folder}: starting"), False, False, "starting")
    run = load_run(folder)
    rows = tail(folder / "metrics.jsonl")
    parts: list[RenderableType] = [_head(run, rows)]
    if run.matrix:
        parts.append(_matrix(run, console))
    if run.status == "running" and (terms := losses(rows)):
        text = Text("losses  ", style="dim")
        for name, value in terms.items():
            text.append(f"{name} ", style="dim").append(f"{value:.4g}   ", style="")
        parts.append(text)
    if run.status == "failed":
        error = run.part("error")
        parts.append(Text(f"{error.get('type', 'error')}: {error.get('message', '')}", style="red"))
    ended = run.status != "running"
    return View(Group(*parts), ended, run.status == "failed", (run.status, run.n_learned))


def _head(run: Run, rows: list[dict[str, Any]]) -> Text:
    text = Text.assemble(
        (run.strategy, "bold"), f" on {run.part('stream').get('name', NONE)}, seed {run.results.get('seed', NONE)}   ",
        (run.status, COLOURS.get(run.status, "")), f"   {run.n_learned}/{run.n_experiences} experiences",
    )  # fmt: skip
    if run.status != "running":
        return text.append(f"   {duration(number(run.part('cost').get('seconds')) or 0)}")
    if rows:
        text.append(f"   step {rows[-1].get('step', 0):,}, epoch {rows[-1].get('epoch', 0) + 1}")
    left = seconds_left(run)
    text.append(f"   about {duration(round(left))} left" if left is not None else "", style="cyan")
    silent = time.time() - last_sign(run.folder)
    if silent > SETTLED:
        text.append(f"   nothing was written for {duration(round(silent))}: was it stopped?", style="yellow")
    return text


def _matrix(run: Run, console: Console) -> Text:
    like = Console(width=console.width, force_terminal=console.is_terminal, color_system=console.color_system, legacy_windows=False)  # type: ignore[arg-type]  # fmt: skip
    with like.capture() as captured:
        print_matrix(run.matrix, run.names, run.metric_name, run.higher_is_better, like)
    return Text.from_ansi(captured.get().rstrip("\n"))


def seconds_left(run: Run) -> float | None:
    """By the mean of the experiences that are complete; None before the first is."""
    done = [sum(v for v in t.values() if isinstance(v, int | float)) for t in run.rows("timing") if isinstance(t, dict)]
    if not done:
        return None
    since = time.time() - (run.folder / "results.json").stat().st_mtime
    mean = sum(done) / len(done)
    return max(mean - since, 0.0) + max(run.n_experiences - len(done) - 1, 0) * mean


def last_sign(folder: Path) -> float:
    """When a run has written last, seconds since the epoch."""
    paths = [folder / "results.json", folder / "metrics.jsonl", *(folder / "checkpoints").glob("*.ckpt")]
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # replaced or removed just now
            continue
    return max(times, default=time.time())


def tail(path: Path) -> list[dict[str, Any]]:
    """The last rows of a JSON-lines file that may be written to at the moment."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL, 0))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut off at either end
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def losses(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The loss terms that were logged last."""
    for row in reversed(rows):
        found = {k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/") and k != "train/lr"}
        if found:
            return {name: float("nan") if value is None else value for name, value in found.items()}
    return {}


# -- a sweep -----------------------------------------------------------------------------------------------------------


def sweep_view(path: Path) -> View:
    """A line for each run."""
    folders, empty = find_runs(path)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, where in (("run", "left"), ("", "left"), ("seed", "right"), ("", "left"), ("learned", "right"),
                        ("average", "right"), ("loss", "right"), ("left", "right")):  # fmt: skip
        table.add_column(name, justify=where)  # type: ignore[arg-type]
    runs = [load_run(folder) for folder in folders]
    for run in runs:
        going = run.status == "running"
        loss = losses(tail(run.folder / "metrics.jsonl")).get("loss") if going else None
        left = seconds_left(run) if going else None
        average = metric_value("average_accuracy", run.metrics["average_accuracy"], run.metric_name)
        table.add_row(
            run.folder.name, run.strategy, str(run.results.get("seed", NONE)),
            Text(run.status, style=COLOURS.get(run.status, "")), f"{run.n_learned}/{run.n_experiences}",
            average if is_share(run.metric_name) or run.n_learned else NONE,
            NONE if loss is None else f"{loss:.4g}", NONE if left is None else duration(round(left)),
        )  # fmt: skip
    for folder in empty:
        table.add_row(folder.name, "", "", Text("starting", style="dim"), "", "", "", "")
    done = sum(run.status == "completed" for run in runs)
    newest = max((run.folder.joinpath("results.json").stat().st_mtime for run in runs), default=time.time())
    compared = path / "comparison.html"
    over = compared.exists() and compared.stat().st_mtime >= newest
    quiet = all(run.status == "completed" for run in runs) and not empty and time.time() - newest > SETTLED
    ended = all(run.status != "running" for run in runs) and (over or quiet)
    head = Text.assemble(
        (str(path), "bold"), f"   {done} of {max(len(runs) + len(empty), read_total(path))} runs complete"
    )
    if not ended and (left := sweep_seconds_left(path, runs, len(empty))) is not None:
        head.append(f"   about {duration(round(left))} left", style="cyan")
    failed = any(run.status == "failed" for run in runs) or (ended and bool(empty))
    return View(Group(head, table), ended, failed, [(r.status, r.n_learned) for r in runs])


def sweep_seconds_left(path: Path, runs: list[Run], n_starting: int) -> float | None:
    """None before a run is complete."""
    took = [number(run.part("cost").get("seconds")) or 0.0 for run in runs if run.status == "completed"]
    if not took:
        return None
    mean = sum(took) / len(took)
    going = [left if (left := seconds_left(run)) is not None else mean for run in runs if run.status == "running"]
    return time_left(mean, [*going, *[mean] * n_starting], read_total(path) - len(runs) - n_starting)
