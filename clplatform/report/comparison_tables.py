"""The tables of a comparison: averages over seeds, every run, what was left out, and all of it as CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from clplatform.metric.matrix import METRICS, Metric
from clplatform.report.document import Section, Table, Text
from clplatform.report.format import (
    NONE,
    is_share,
    mean_std,
    metric_value,
    scientific,
    seconds,
    shorten,
    size,
    spread,
    words,
)
from clplatform.report.grouping import Group, Setting
from clplatform.report.run import Run, number, trained_parameters

ALWAYS = (
    "average_accuracy",
    "average_anytime_accuracy",
    "average_forgetting",
    "backward_transfer",
    "learning_accuracy",
)
IF_KNOWN = ("forward_transfer", "intransigence", "transfer", "forgetting_ratio")


def shown(setting: Setting) -> list[Metric]:
    """The metrics of a comparison; those that are often undefined only where some run has them."""
    runs = [run for group in setting.groups for run in group.runs]
    known = [name for name in IF_KNOWN if any(run.metrics[name] is not None for run in runs)]
    return [metric for metric in METRICS if metric.name in (*ALWAYS, *known)]


def _titles(setting: Setting) -> list[str]:
    return [metric.title.replace("accuracy", words(setting.metric)) for metric in shown(setting)]


def relative(folder: Path, output: Path) -> str:
    """The folder as seen from where the comparison is."""
    return Path(os.path.relpath(folder.resolve(), output.resolve())).as_posix()


def values_of(group: Group, name: str) -> list[float]:
    """A metric of all runs of a group that have it."""
    return [value for run in group.runs if (value := run.metrics[name]) is not None]


def averages(setting: Setting) -> Table:
    """Mean ± standard deviation of every group, with how many parameters were trained where groups differ in it."""
    trained = [{n for run in group.runs if (n := trained_parameters(run)) is not None} for group in setting.groups]
    differ = len(set().union(*trained)) > 1
    unit = "; % and percentage points" if is_share(setting.metric) else ""
    rows = []
    for group, counts in zip(setting.groups, trained, strict=True):
        cells = [spread(values_of(group, m.name), m.name, setting.metric) for m in shown(setting)]
        parameters = [f"{max(counts):,.0f}" if counts else NONE] if differ else []
        rows.append([group.label, str(len(group.runs)), *cells, *parameters, _time(group)])
    caption = f"Mean ± sample standard deviation over seeds{unit}"
    columns = ["parameters trained"] if differ else []
    return Table(caption, ["strategy", "seeds", *_titles(setting), *columns, "seconds"], rows)


def _time(group: Group) -> str:
    values = [value for run in group.runs if (value := number(run.part("cost").get("seconds"))) is not None]
    if not values:
        return NONE
    mean, deviation = mean_std(values)
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


# What is shown of a run's costs: its name in the record → column, and how to write it.
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("time", seconds),
    "flops": ("FLOPs", scientific),
    "steps": ("steps", lambda value: f"{value:,.0f}"),
    "samples": ("samples trained on", lambda value: f"{value:,.0f}"),
    "peak_memory_bytes": ("peak memory", size),
    "trained_parameters": ("parameters trained", lambda value: f"{value:,.0f}"),
    "extra_parameters": ("numbers held beside the model", lambda value: f"{value:,.0f}"),
    "stored_samples": ("samples stored", lambda value: f"{value:,.0f}"),
    "buffer_bytes": ("memory of samples and masks", size),
}


def costs(setting: Setting) -> Table:
    """What every group costs, averaged over its runs; only what some group has."""
    means: dict[str, dict[str, float]] = {}
    for group in setting.groups:
        own = [{**run.part("cost"), "trained_parameters": trained_parameters(run)} for run in group.runs]
        values = {name: [v for cost in own if (v := number(cost.get(name))) is not None] for name in COSTS}
        means[group.label] = {name: mean_std(v)[0] for name, v in values.items() if v}
    used = [name for name in COSTS if any(means[group.label].get(name) for group in setting.groups)]
    rows = [
        [
            group.label,
            *(COSTS[name][1](means[group.label][name]) if name in means[group.label] else NONE for name in used),
        ]
        for group in setting.groups
    ]
    return Table("What it costs, mean over seeds", ["strategy", *(COSTS[name][0] for name in used)], rows)


def every_run(setting: Setting, output: Path) -> Table:
    """The metrics of each run, linked to its report if there is one."""
    rows, links = [], {}
    for group in setting.groups:
        for run in group.runs:
            if (run.folder / "report.html").is_file():
                links[len(rows)] = f"{relative(run.folder, output)}/report.html"
            order = run.order_seed
            values = [metric_value(m.name, run.metrics[m.name], setting.metric, unit=False) for m in shown(setting)]
            spent = seconds(number(run.part("cost").get("seconds")))
            seed = str(run.results.get("seed", NONE))
            rows.append([relative(run.folder, output), group.label, seed, "fixed" if order is None else str(order)])
            rows[-1] += [*values, spent]
    header = ["run", "strategy", "seed", "class order", *_titles(setting), "time"]
    return Table("Every run", header, rows, folded=len(rows) > 12, links=links)


def left_out(incomplete: list[Run], repeated: list[Run], broken: list[tuple[str, str]], output: Path) -> Section:
    """Every run that is part of no average, and why."""
    rows = []
    for run in incomplete:
        error = run.part("error")
        reason = f"{error.get('type', '')}: {error.get('message', '')}".strip(": ") if error else ""
        progress = f"{run.n_learned} of {run.n_experiences}"
        status = run.status if run.status != "completed" else "incomplete"
        rows.append([relative(run.folder, output), status, run.strategy, progress, shorten(reason, 200)])
    for run in repeated:
        reason = "the same settings and seeds as another run: counted once"
        progress = f"{run.n_learned} of {run.n_experiences}"
        rows.append([relative(run.folder, output), "repeated", run.strategy, progress, reason])
    rows += [[name, "unreadable", NONE, NONE, shorten(reason, 300)] for name, reason in broken]
    if not rows:
        return Section("left-out", "", [])
    text = Text("None of these is part of any average above.")
    table = Table("Runs left out", ["run", "status", "strategy", "learned", "why"], rows, prose=True)
    return Section("left-out", "Left out", [text, table])


def to_csv(
    runs: Sequence[Run],
    broken: Sequence[tuple[str, str]],
    counted: set[int],
    found: Sequence[Setting],
    output: Path,
) -> str:
    """One line for each run, whatever its status; accuracies are fractions, missing values empty."""
    labels = {id(run): group.label for setting in found for group in setting.groups for run in group.runs}
    names = [m.name for m in METRICS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([
        "run", "status", "averaged", "stream", "scenario", "n_experiences", "n_learned", "backbone", "strategy",
        "group", "seed", "stream_seed", "primary_metric", *names, "seconds",
    ])  # fmt: skip
    for run in runs:
        stream = run.part("stream")
        values = ["" if run.metrics[name] is None else repr(run.metrics[name]) for name in names]
        writer.writerow([
            relative(run.folder, output), run.status, id(run) in counted, stream.get("name", ""),
            stream.get("scenario", ""), run.n_experiences, run.n_learned, run.part("backbone").get("name", ""),
            run.strategy, labels.get(id(run), ""), run.results.get("seed", ""),
            "" if run.order_seed is None else run.order_seed, run.metric_name, *values,
            run.part("cost").get("seconds", ""),
        ])  # fmt: skip
    for name, _ in broken:
        writer.writerow([name, "unreadable", False, *[""] * (len(names) + 11)])
    return text.getvalue()
