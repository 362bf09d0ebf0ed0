"""Groups over several streams: ranks, Friedman's test, and what of it may be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clplatform.metric.statistics import ALPHA, FEWEST_FOR_IQM, Ranking, rank
from clplatform.report.comparison_tables import values_of
from clplatform.report.document import Figure, Part, Section, Table, Text
from clplatform.report.format import NONE, mean_std, p_value, spread
from clplatform.report.grouping import Group, Setting
from clplatform.report.intervals import interquartile
from clplatform.report.rank_diagram import rank_diagram

NAME = "average_accuracy"
MOST_IN_DIAGRAM = 20


def ranking(found: Sequence[Setting]) -> Section:
    """The groups that several settings have in common; an empty section where there are none."""
    streams, labels = common(found)
    if len(streams) < 2 or len(labels) < 2:
        return Section("ranking", "", [])
    groups = [{group.label: group for group in setting.groups} for setting in streams]
    scores = [[mean_std(values_of(own[label], NAME))[0] for label in labels] for own in groups]
    result = rank(scores, [setting.groups[0].runs[0].higher_is_better for setting in streams])
    parts: list[Part] = [_table(streams, labels, groups, result), Text(_reading(streams, labels, result))]
    if 2 < len(labels) <= MOST_IN_DIAGRAM:
        svg = rank_diagram(labels, result, "ranking-diagram")
        reading = (
            "Average ranks, the best on the left. Groups joined by a bar are not told apart (Nemenyi; Demšar 2006)."
        )
        parts.append(Figure("Critical difference diagram", svg, reading, wide=True))
    absent = sorted({g.label for s in found for g in s.groups if not g.is_bound} - set(labels))
    if absent:
        parts.append(Text(f"Not ranked, because not every stream has them: {', '.join(absent)}."))
    return Section("ranking", f"Ranking over {len(streams)} streams", parts)


def common(found: Sequence[Setting]) -> tuple[list[Setting], list[str]]:
    """Settings that share two groups or more with the one that has most, and the groups that all of these have."""
    names = [[g.label for g in setting.groups if not g.is_bound and values_of(g, NAME)] for setting in found]
    largest = max(names, key=len, default=[])
    streams, labels = [], largest
    for setting, own in zip(found, names, strict=True):
        shared = [label for label in labels if label in own]
        if len(shared) >= 2:
            streams.append(setting)
            labels = shared
    return streams, labels


def _table(
    streams: Sequence[Setting], labels: Sequence[str], groups: Sequence[dict[str, Group]], result: Ranking
) -> Table:
    same_metric = len({setting.metric for setting in streams}) == 1
    with_iqm = same_metric and all(
        sum(len(values_of(own[label], NAME)) for own in groups) >= FEWEST_FOR_IQM for label in labels
    )
    rows = []
    for j in sorted(range(len(labels)), key=lambda j: float(result.average[j])):
        cells = [f"{result.average[j]:.2f}"]
        if with_iqm:
            cells += interquartile([values_of(own[labels[j]], NAME) for own in groups], streams[0].metric)
        for i, setting in enumerate(streams):
            values = values_of(groups[i][labels[j]], NAME)
            cells.append(f"{result.ranks[i, j]:g} · {spread(values, NAME, setting.metric)}")
        rows.append([labels[j], *cells])
    header = ["strategy", "average rank", *(["IQM", "95 % interval"] if with_iqm else []), *(s.title for s in streams)]
    iqm = "; IQM: interquartile mean over the runs of all streams, stratified bootstrap" if with_iqm else ""
    return Table(f"Average ranks, and rank and mean ± standard deviation on every stream{iqm}", header, rows)


def _reading(streams: Sequence[Setting], labels: Sequence[str], result: Ranking) -> str:
    n, k = len(streams), len(labels)
    if result.statistic is None:
        text = f"Two groups on {n} streams: sign test, {_p(result.p)}."
        smallest = 2 / 2**n
    else:
        text = f"Friedman's test over {n} streams: χ²_F = {result.statistic:.2f}, {_p(result.p)} (permutations)."
        smallest = math.factorial(k) ** (1.0 - n) if k < 20 else 0.0
    if smallest > ALPHA:
        return f"{text} With so few streams p cannot be below {smallest:.2g}: the ranks are a description, and no more."
    if k == 2:
        return text
    gap = result.critical_difference
    order = sorted(range(k), key=lambda j: float(result.average[j]))
    close = [labels[j] for j in order[1:] if result.average[j] - result.average[order[0]] < gap]
    text += f" Average ranks that differ by less than {gap:.2f} are not told apart (Nemenyi, α = {ALPHA:g})"
    if result.p > ALPHA:
        return f"{text}; since Friedman's p is above {ALPHA:g}, none are."
    return f"{text}: from {labels[order[0]]}, that is {', '.join(close) if close else NONE}."


def _p(value: float) -> str:
    text = p_value(value).removesuffix(" *")
    return f"p {text}" if text.startswith("<") else f"p = {text}"
