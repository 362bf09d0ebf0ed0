"""Many runs side by side: mean ± standard deviation over seeds; what is incomplete is listed, never averaged in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clplatform.metric.matrix import average_accuracy, intransigence
from clplatform.report import figures
from clplatform.report.comparison_tables import averages, costs, every_run, left_out, relative, to_csv, values_of
from clplatform.report.document import Document, Figure, Headline, Part, Section, Table, Text
from clplatform.report.format import is_share, spread, words
from clplatform.report.grouping import Group, Setting, independent, settings
from clplatform.report.heatmap import matrix_map
from clplatform.report.run import Matrix, Run, load_run
from clplatform.types import ClplatformError


def compare(folders: Sequence[Path], empty: Sequence[Path], output: Path) -> tuple[Document, str]:
    """The comparison of run directories, and its table of runs as CSV (fractions, full precision).

    Args:
        folders: run directories.
        empty: folders of jobs that left no `results.json`.
        output: where the comparison will be written: links and names are relative to it.
    """
    runs, broken = [], [(relative(folder, output), "no results.json: stopped before any result") for folder in empty]
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except ClplatformError as error:
            broken.append((relative(folder, output), str(error)))
    complete, incomplete = [], []
    for run in runs:
        (complete if is_complete(run) else incomplete).append(run)
    found, repeated = [], []
    against_joint: set[str] = set()
    for setting in settings(complete):
        for group in setting.groups:
            group.runs, again = independent(group.runs)
            repeated += again
        setting.groups.sort(key=_rank)
        if refer_to_joint(setting):
            against_joint.add(setting.title)
        found.append(setting)
    sections = [_section(i, setting, output, setting.title in against_joint) for i, setting in enumerate(found)]
    sections.append(left_out(incomplete, repeated, broken, output))
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
    """Completed by its own word, and with a whole matrix."""
    n = run.n_experiences
    return run.status == "completed" and run.n_learned == n > 0 and len(run.matrix[0]) == n


def _rank(group: Group) -> float:
    values = values_of(group, "average_accuracy")
    if not values:
        return float("inf")
    mean = sum(values) / len(values)
    return -mean if group.runs[0].higher_is_better else mean


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
    name, metric = "average_accuracy", found[0].metric
    unit = " %" if is_share(metric) else ""
    return [
        Headline(g.label, spread(values_of(g, name), name, metric) + unit, f"average {words(metric)}, {_seeds(g)}")
        for g in found[0].groups[:6]
    ]


def _seeds(group: Group) -> str:
    n = len(group.runs)
    return f"{n} seed{'s' if n != 1 else ''}"


def _section(index: int, setting: Setting, output: Path, against_joint: bool) -> Section:
    """One setting: averages, curves, heat maps, differences in settings, and every run."""
    name, metric = f"setting-{index + 1}", setting.metric
    parts: list[Part] = [averages(setting), costs(setting)]
    if setting.differences:
        labels = [group.label for group in setting.groups]
        rows = [[label, *(values[label] for values in setting.differences.values())] for label in labels]
        caption = "Settings that differ between the groups, beside those of the strategies"
        parts.append(Table(caption, ["strategy", *setting.differences], rows))
    if against_joint:
        parts.append(Text("Intransigence is measured against the mean of the joint runs of this comparison."))
    parts.append(_curves(setting, name))
    for i, group in enumerate(setting.groups):
        run, drawing = group.runs[0], f"{name}-matrix-{i + 1}"
        mean = mean_matrix([run.matrix for run in group.runs])
        svg = matrix_map(mean, run.names, metric, drawing, small=True, higher_is_better=run.higher_is_better)
        reading = f"Mean over {_seeds(group)}: rows are trained up to, columns evaluated on."
        parts.append(Figure(group.label, svg, reading, third=True))
    parts.append(every_run(setting, output))
    return Section(name, setting.title, parts)


def _curves(setting: Setting, name: str) -> Figure:
    """The average over what was learned so far, after each experience: every seed, and their mean."""
    metric = setting.metric
    samples = {
        group.label: [[average_accuracy(run.matrix[: i + 1]) for i in range(1, len(run.matrix))] for run in group.runs]
        for group in setting.groups
    }
    means = {label: [_mean(values) for values in zip(*curves, strict=True)] for label, curves in samples.items()}
    several = {label: curves for label, curves in samples.items() if len(curves) > 1}
    ylabel = f"average {words(metric)}" + (" (%)" if is_share(metric) else "")
    svg = figures.lines(means, 1, metric, ylabel, f"{name}-curves", samples=several, wide=True)
    reading = f"The average {words(metric)} over the experiences learned so far"
    reading += "; thin lines are single seeds, thick lines their means." if several else "."
    return Figure(f"Average {words(metric)} over the stream", svg, reading, wide=True)


def refer_to_joint(setting: Setting) -> bool:
    """Set the intransigence of all runs that have none, if joint training is among the groups, exactly once. Was there
    one to set?"""
    joint = [group for group in setting.groups if group.runs[0].rows("strategy") == ["joint"]]
    if len(joint) != 1:
        return False
    reference = mean_matrix([run.matrix for run in joint[0].runs])
    without = [
        run
        for group in setting.groups
        for run in (group.runs if group is not joint[0] else ())
        if run.metrics["intransigence"] is None
    ]
    for run in without:
        run.metrics["intransigence"] = intransigence(run.matrix, reference, run.higher_is_better)
    return bool(without)


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Cell by cell; a cell that is null in one run is null."""
    return [[_mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
