"""How much a strategy depends on its settings: average accuracy over one of them, or over two."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clplatform.report.comparison_tables import values_of
from clplatform.report.document import Figure
from clplatform.report.format import words
from clplatform.report.grouping import Group, Setting
from clplatform.report.scatter import over_setting

FEWEST_GROUPS = 3  # of two values a table says everything
MOST_LINES = 8


def sensitivities(setting: Setting, name: str) -> list[Figure]:
    """A plot for every strategy whose groups differ in one or two numeric settings and nothing else."""
    families: dict[tuple[str, str | None], list[Group]] = {}
    for group in setting.groups:
        families.setdefault((group.runs[0].strategy, group.runs[0].tuning), []).append(group)
    found = []
    for (strategy, tuning), groups in families.items():
        keys = numeric_settings(groups)
        if len(groups) < FEWEST_GROUPS or not 1 <= len(keys) <= 2:
            continue
        label = f"{strategy}, {tuning}" if tuning else strategy
        svg = over_setting(_series(groups, keys), keys[0], setting.metric, f"{name}-sensitivity-{len(found) + 1}")
        reading = f"Average {words(setting.metric)} over {keys[0]}, means over seeds, bars: 95 % intervals"
        reading += f"; one line for each {keys[1]}." if len(keys) > 1 else "."
        found.append(Figure(f"Sensitivity of {label}", svg, reading))
    return found


def numeric_settings(groups: Sequence[Group]) -> list[str]:
    """The settings in which groups differ, that with most values first; none if one of them is not a number.

    Settings that always change together count as one (epochs, which the stream and the trainer both record).
    """
    columns: dict[str, list[float]] = {}
    for key in dict.fromkeys(key for group in groups for key in group.own):
        numbers = [_number(group.own.get(key)) for group in groups]
        if any(value is None for value in numbers):
            return []
        column = [value for value in numbers if value is not None]
        if column not in columns.values():
            columns[key] = column
    return sorted(columns, key=lambda key: -len(set(columns[key])))


def _series(groups: Sequence[Group], keys: Sequence[str]) -> dict[str, list[tuple[float, list[float]]]]:
    """Values at every setting of the first key, for each value of the second."""
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for group in groups:
        line = f"{keys[1].rpartition('.')[2]}={group.own[keys[1]]}" if len(keys) > 1 else ""
        values = values_of(group, "average_accuracy")
        if values:
            series.setdefault(line, []).append((float(group.own[keys[0]]), values))
    ordered = sorted(series.items(), key=lambda item: float(item[0].rpartition("=")[2] or 0))
    return {line: sorted(points, key=lambda point: point[0]) for line, points in ordered[:MOST_LINES]}


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
