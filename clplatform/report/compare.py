"""Many runs side by side: mean ± standard deviation over seeds; what is incomplete is listed, never averaged in."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from clplatform.metric.matrix import METRICS, average_accuracy
from clplatform.report import figures
from clplatform.report.document import Document, Figure, Headline, Part, Section, Table, Text
from clplatform.report.format import NONE, is_share, mean_std, metric_value, seconds, shorten, spread, words
from clplatform.report.grouping import Group, Setting, independent, settings
from clplatform.report.run import Matrix, Run, load_run, number
from clplatform.types import ClplatformError

SHOWN = ("average_accuracy", "average_anytime_accuracy", "average_forgetting", "backward_transfer", "learning_accuracy")


def compare(folders: Sequence[Path], empty: Sequence[Path], output: Path) -> tuple[Document, str]:
    """The comparison of run directories, and its table of runs as CSV (fractions, full precision).

    Args:
        folders: run directories.
        empty: folders of jobs that left no `results.json`.
        output: where the comparison will be written: links and names are relative to it.
    """
    runs, broken = [], [(_name(folder, output), "no results.json: stopped before any result") for folder in empty]
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except ClplatformError as error:
            broken.append((_name(folder, output), str(error)))
    complete, incomplete = [], []
    for run in runs:
        (complete if is_complete(run) else incomplete).append(run)
    found, repeated = [], []
    for setting in settings(complete):
        for group in setting.groups:
            group.runs, again = independent(group.runs)
            repeated += again
        setting.groups.sort(key=_rank)
        found.append(setting)
    sections = [_section(i, setting, output) for i, setting in enumerate(found)]
    sections.append(_left_out(incomplete, repeated, broken, output))
    averaged = sum(len(group.runs) for setting in found for group in setting.groups)
    document = Document(
        title=f"Comparison of {_count(len(runs) + len(broken))}",
        subtitle=f"{averaged} completed; groups that differ by more than the seed: {sum(len(s.groups) for s in found)}",
        status="" if averaged == len(runs) + len(broken) else "incomplete",
        banner=_banner(incomplete, repeated, broken),
        facts=[],
        headlines=_headlines(found),
        sections=[section for section in sections if section.parts],
    )
    counted = {id(run) for setting in found for group in setting.groups for run in group.runs}
    return document, to_csv(runs, broken, counted, found, output)


def is_complete(run: Run) -> bool:
    """Completed by its own word, and with a full last row."""
    return run.status == "completed" and bool(run.matrix) and run.n_learned == run.n_experiences > 0


def _name(folder: Path, output: Path) -> str:
    """The folder as seen from where the comparison is."""
    return Path(os.path.relpath(folder.resolve(), output.resolve())).as_posix()


def _rank(group: Group) -> float:
    values = _values(group, "average_accuracy")
    if not values:
        return float("inf")
    mean = sum(values) / len(values)
    return -mean if group.runs[0].higher_is_better else mean


def _values(group: Group, name: str) -> list[float]:
    return [value for run in group.runs if (value := run.metrics[name]) is not None]


def _banner(incomplete: list[Run], repeated: list[Run], broken: list[tuple[str, str]]) -> str:
    parts = []
    if incomplete or broken:
        parts.append(f"Listed below and not averaged in: {_count(len(incomplete) + len(broken))} failed or incomplete.")
    if repeated:
        parts.append(f"Counted once: {_count(len(repeated))} with the settings and seeds of another run.")
    return "\n".join(parts)


def _count(n: int) -> str:
    return f"{n} run{'s' if n != 1 else ''}"


def _headlines(found: list[Setting]) -> list[Headline]:
    if len(found) != 1:
        return []
    setting = found[0]
    unit = " %" if is_share(setting.metric) else ""
    title = f"average {words(setting.metric)}"
    return [
        Headline(g.label, spread(_values(g, SHOWN[0]), SHOWN[0], setting.metric) + unit, f"{title}, {_seeds(g)}")
        for g in setting.groups[:6]
    ]


def _seeds(group: Group) -> str:
    n = len(group.runs)
    return f"{n} seed{'s' if n != 1 else ''}"


def _section(index: int, setting: Setting, output: Path) -> Section:
    """One setting: averages, curves, heat maps, differences in settings, and every run."""
    name, metric = f"setting-{index + 1}", setting.metric
    parts: list[Part] = [_averages(setting)]
    if setting.differences:
        labels = [group.label for group in setting.groups]
        rows = [[label, *(values[label] for values in setting.differences.values())] for label in labels]
        caption = "Settings that differ between the groups, beside those of the strategies"
        parts.append(Table(caption, ["strategy", *setting.differences], rows))
    curves, bands = {}, {}
    for group in setting.groups:
        curves[group.label], bands[group.label] = _curve(group.runs)
    ylabel = f"average {words(metric)}" + (" (%)" if is_share(metric) else "")
    svg = figures.lines(curves, 1, metric, ylabel, f"{name}-curves", bands=bands, wide=True)
    reading = "The mean over the experiences learned so far; bands are ± one standard deviation over seeds."
    parts.append(Figure(f"Average {words(metric)} over the stream", svg, reading, "", wide=True))
    for i, group in enumerate(setting.groups):
        mean = _mean_matrix([run.matrix for run in group.runs])
        svg = figures.matrix_map(mean, group.runs[0].names, metric, f"{name}-matrix-{i + 1}", small=True)
        reading = f"Mean over {_seeds(group)}: rows are trained up to, columns evaluated on."
        parts.append(Figure(group.label, svg, reading, "", third=True))
    parts.append(_runs(setting, output))
    return Section(name, setting.title, parts)


def _averages(setting: Setting) -> Table:
    titles = [m.title.replace("accuracy", words(setting.metric)) for m in METRICS if m.name in SHOWN]
    unit = "; % and percentage points" if is_share(setting.metric) else ""
    rows = []
    for group in setting.groups:
        cells = [spread(_values(group, m.name), m.name, setting.metric) for m in METRICS if m.name in SHOWN]
        rows.append([group.label, str(len(group.runs)), *cells, _time(group)])
    caption = f"Mean ± sample standard deviation over seeds{unit}"
    return Table(caption, ["strategy", "seeds", *titles, "seconds"], rows)


def _time(group: Group) -> str:
    values = [value for run in group.runs if (value := number(run.part("cost").get("seconds"))) is not None]
    if not values:
        return NONE
    mean, deviation = mean_std(values)
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _curve(runs: Sequence[Run]) -> tuple[list[float | None], list[float | None]]:
    """Mean and standard deviation over runs of the average accuracy after each experience."""
    means, deviations = [], []
    for i in range(1, runs[0].n_learned + 1):
        values = [v for run in runs if (v := average_accuracy(run.matrix[: i + 1])) is not None]
        mean, deviation = mean_std(values) if values else (None, None)
        means.append(mean)
        deviations.append(deviation)
    return means, deviations


def _mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Cell by cell; a cell that is null in one run is null."""
    return [
        [None if None in cells else sum(cells) / len(cells) for cells in zip(*rows, strict=True)]  # type: ignore[arg-type]
        for rows in zip(*matrices, strict=True)
    ]


def _runs(setting: Setting, output: Path) -> Table:
    rows, links = [], {}
    for group in setting.groups:
        for run in group.runs:
            if (run.folder / "report.html").is_file():
                links[len(rows)] = f"{_name(run.folder, output)}/report.html"
            order = run.part("stream").get("seed")
            values = [metric_value(name, run.metrics[name], setting.metric, unit=False) for name in SHOWN]
            spent = seconds(number(run.part("cost").get("seconds")))
            seed = str(run.results.get("seed", NONE))
            rows.append([_name(run.folder, output), group.label, seed, "fixed" if order is None else str(order)])
            rows[-1] += [*values, spent]
    titles = [m.title.replace("accuracy", words(setting.metric)) for m in METRICS if m.name in SHOWN]
    header = ["run", "strategy", "seed", "class order", *titles, "time"]
    return Table("Every run", header, rows, folded=len(rows) > 12, links=links)


def _left_out(incomplete: list[Run], repeated: list[Run], broken: list[tuple[str, str]], output: Path) -> Section:
    rows = []
    for run in incomplete:
        error = run.part("error")
        reason = f"{error.get('type', '')}: {error.get('message', '')}".strip(": ") if error else ""
        progress = f"{run.n_learned} of {run.n_experiences}"
        status = run.status if run.status != "completed" else "incomplete"
        rows.append([_name(run.folder, output), status, run.strategy, progress, shorten(reason, 200)])
    for run in repeated:
        reason = "the same settings and seeds as another run: counted once"
        progress = f"{run.n_learned} of {run.n_experiences}"
        rows.append([_name(run.folder, output), "repeated", run.strategy, progress, reason])
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
            _name(run.folder, output), run.status, id(run) in counted, stream.get("name", ""),
            stream.get("scenario", ""), run.n_experiences, run.n_learned, run.part("backbone").get("name", ""),
            run.strategy, labels.get(id(run), ""), run.results.get("seed", ""),
            "" if stream.get("seed") is None else stream["seed"], run.metric_name, *values,
            run.part("cost").get("seconds", ""),
        ])  # fmt: skip
    for name, _ in broken:
        writer.writerow([name, "unreadable", False, *[""] * (len(names) + 11)])
    return text.getvalue()
