"""The average over what was learned so far, group by group: means over seeds, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence

from clplatform.metric.matrix import average_accuracy
from clplatform.metric.statistics import t_interval
from clplatform.report import figures
from clplatform.report.document import Figure
from clplatform.report.format import is_share, words
from clplatform.report.grouping import Group, Setting
from clplatform.report.run import Matrix

MOST_GROUPS = 12  # curves in one figure, the best ones
MOST_SEEDS = 30  # thin lines in one figure; beyond that the bands alone are read better
FEWEST_FOR_BAND = 3

Curve = list[float | None]


def curves(setting: Setting, name: str) -> Figure:
    """The average after each experience: mean, 95 % band from three seeds on, and single seeds."""
    metric = setting.metric
    groups = setting.groups[:MOST_GROUPS]
    samples = {group.label: [over_stream(run.matrix) for run in group.runs] for group in groups}
    means = {label: [mean(values) for values in zip(*some, strict=True)] for label, some in samples.items()}
    bands = {group.label: _band(samples[group.label]) for group in groups if len(group.runs) >= FEWEST_FOR_BAND}
    seeds = {label: some for label, some in samples.items() if len(some) > 1}
    if sum(map(len, seeds.values())) > MOST_SEEDS:
        seeds = {label: some for label, some in seeds.items() if label not in bands}
    ylabel = f"average {words(metric)}" + (" (%)" if is_share(metric) else "")
    svg = figures.lines(means, 1, metric, ylabel, f"{name}-curves", samples=seeds, bands=bands, wide=True)
    return Figure(
        f"Average {words(metric)} over the stream", svg, _reading(setting, bool(seeds), bool(bands)), wide=True
    )


def over_stream(matrix: Matrix) -> Curve:
    """The average over the experiences learned, after each of them."""
    return [average_accuracy(matrix[: i + 1]) for i in range(1, len(matrix))]


def mean(values: Sequence[float | None]) -> float | None:
    """Of all values; None if one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _band(some: Sequence[Curve]) -> list:
    """Student's interval of the mean at every experience; None where a seed has no value."""
    steps = [[value for value in values if value is not None] for values in zip(*some, strict=True)]
    return [t_interval(values) if len(values) == len(some) else None for values in steps]


def _reading(setting: Setting, seeds: bool, bands: bool) -> str:
    text = f"The average {words(setting.metric)} over the experiences learned so far"
    text += "; thick lines are means over seeds" if seeds or bands else ""
    text += f", areas their 95 % confidence intervals ({FEWEST_FOR_BAND} seeds or more)" if bands else ""
    text += ", thin lines single seeds" if seeds else ""
    left = len(setting.groups) - MOST_GROUPS
    return text + (f". The best {MOST_GROUPS} groups; {left} more are in the tables." if left > 0 else ".")


def spread_of(group: Group) -> str:
    """`3 seeds`"""
    n = len(group.runs)
    return f"{n} seed{'s' if n != 1 else ''}"
