"""Many runs side by side: mean ± standard deviation over seeds; what is incomplete is listed, never averaged in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clplatform.metric.matrix import intransigence
from clplatform.report.budget import budget, kept, used
from clplatform.report.comparison_paired import paired_parts, paired_tables
from clplatform.report.comparison_tables import averages, costs, every_run, left_out, relative, to_csv, values_of
from clplatform.report.curves import curves, mean, spread_of
from clplatform.report.document import Document, Figure, Headline, Part, Section, Table, Text
from clplatform.report.format import NONE, is_share, size, spread, words
from clplatform.report.grouping import Group, Setting, independent, settings
from clplatform.report.heatmap import matrix_map
from clplatform.report.intervals import intervals
from clplatform.report.latex import HEADER, averages_tex, plain_tex
from clplatform.report.pareto import pareto_parts
from clplatform.report.ranking import ranking
from clplatform.report.run import Matrix, Run, load_run
from clplatform.report.scores import averages_of_others
from clplatform.report.selection import selection
from clplatform.report.sensitivity import sensitivities
from clplatform.types import ClplatformError

# Heat maps of a setting, of its best groups; and of all settings together, if that leaves each at least FEWEST_MAPS.
MOST_MAPS, MOST_MAPS_IN_ALL, FEWEST_MAPS = 12, 24, 3


@dataclass(frozen=True)
class Compared:
    """A comparison: the page, the table of runs as CSV (fractions, full precision), and tables as LaTeX. `averaged`: how
    many runs are part of it."""

    document: Document
    csv: str
    tex: str
    averaged: int


def compare(folders: Sequence[Path], empty: Sequence[Path], output: Path) -> Compared:
    """The comparison of run directories.

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
    maps = min(MOST_MAPS, max(FEWEST_MAPS, MOST_MAPS_IN_ALL // max(len(found), 1)))
    sections = [_section(i, setting, output, setting.title in against_joint, maps) for i, setting in enumerate(found)]
    over_streams = ranking(found)
    sections += [over_streams, left_out(incomplete, repeated, broken, output)]
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
    csv = to_csv(runs, broken, counted, found, output)
    return Compared(document, csv, _tex(found, over_streams), averaged)


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
        Headline(g.label, spread(values_of(g, name), name, metric) + unit, f"average {words(metric)}, {spread_of(g)}")
        for g in found[0].groups[:6]
    ]


def _section(index: int, setting: Setting, output: Path, against_joint: bool, maps: int) -> Section:
    """One setting: averages, how sure they are, curves, trade-offs, heat maps, differences in settings, and every run."""
    name = f"setting-{index + 1}"
    parts: list[Part] = [*budget_parts(setting), averages(setting), *selection(setting, output)]
    sure = intervals(setting)
    parts += [sure] if sure else []
    parts += averages_of_others(setting)
    if against_joint:
        parts.append(Text("Intransigence is measured against the mean of the joint runs of this comparison."))
    parts += [curves(setting, name), *paired_parts(setting), costs(setting), *pareto_parts(setting, name)]
    parts += sensitivities(setting, name)
    if setting.differences:
        labels = [group.label for group in setting.groups]
        rows = [[label, *(values[label] for values in setting.differences.values())] for label in labels]
        caption = "Settings that differ between the groups, beside those of the strategies"
        parts.append(Table(caption, ["strategy", *setting.differences], rows, folded=len(rows) > 20))
    parts += _maps(setting, name, maps)
    parts.append(every_run(setting, output))
    return Section(name, setting.title, parts)


def budget_parts(setting: Setting) -> list[Part]:
    """Which budget was equal, and what each group has really used of it."""
    runs = setting.groups[0].runs
    if not budget(runs[0]):
        return []
    found: list[Part] = [Text(f"Equal budget: {budget(runs[0])}.")]
    memory = any("bytes" in group.runs[0].part("budget") for group in setting.groups)
    rows = []
    for group in setting.groups:
        held = [size(mean([kept(run) for run in group.runs]))] if memory else []
        rows.append([group.label, used(group.runs) or NONE, *held])
    header = ["strategy", "used by an experience", *(["kept beside the model"] if memory else [])]
    return [*found, Table("What was really used, mean over seeds", header, rows, folded=len(rows) > 12)]


def _maps(setting: Setting, name: str, most: int) -> list[Part]:
    """The mean matrix of every group, of the best ones where there are many."""
    parts: list[Part] = []
    for i, group in enumerate(setting.groups[:most]):
        run, drawing = group.runs[0], f"{name}-matrix-{i + 1}"
        cells = mean_matrix([run.matrix for run in group.runs])
        svg = matrix_map(cells, run.names, setting.metric, drawing, small=True, higher_is_better=run.higher_is_better)
        reading = f"Mean over {spread_of(group)}: rows are trained up to, columns evaluated on."
        parts.append(Figure(group.label, svg, reading, third=True))
    if len(setting.groups) > most:
        parts.append(Text(f"The matrices of the best {most} of {len(setting.groups)} groups."))
    return parts


def _tex(found: Sequence[Setting], over_streams: Section) -> str:
    tables = [HEADER]
    for i, setting in enumerate(found):
        name = f"setting-{i + 1}"
        tables.append(averages_tex(setting, name))
        tables += [plain_tex(t, f"{name}-scores") for t in averages_of_others(setting)]
        tables += [plain_tex(t, f"{name}-paired-{j + 1}") for j, t in enumerate(paired_tables(setting))]
    tables += [plain_tex(part, "ranking") for part in over_streams.parts if isinstance(part, Table)]
    return "\n".join(tables)


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
    return [[mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
