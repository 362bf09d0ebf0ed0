"""Accuracy against what it costs: which groups no other group beats in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clplatform.report.comparison_tables import values_of
from clplatform.report.document import Figure, Part, Table
from clplatform.report.format import NONE, mean_std, words
from clplatform.report.grouping import Group, Setting
from clplatform.report.run import Run, number, trained_parameters
from clplatform.report.scatter import Point, scatter

VARIES = 0.02  # a cost that differs by less between groups is the same

Units = Sequence[tuple[float, str]]
SECONDS: Units = ((1, "s"), (60, "min"), (3600, "h"))
BYTES: Units = ((1, "B"), (2**10, "KiB"), (2**20, "MiB"), (2**30, "GiB"), (2**40, "TiB"))
NUMBERS: Units = ((1, ""), (1e3, "thousand"), (1e6, "million"), (1e9, "billion"))
FLOPS: Units = ((1, "FLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP"))


@dataclass(frozen=True)
class Cost:
    """A cost of a run; `absent`: what a run that does not record it costs (None: not known)."""

    name: str
    title: str
    units: Units
    value: Callable[[Run], float | None]
    absent: float | None = None


def _spent(name: str) -> Callable[[Run], float | None]:
    return lambda run: number(run.part("cost").get(name))


COSTS = (
    Cost("seconds", "time", SECONDS, _spent("seconds")),
    Cost("flops", "floating-point operations", FLOPS, _spent("flops")),
    Cost("memory", "peak memory", BYTES, _spent("peak_memory_bytes")),
    Cost("trained", "parameters trained", NUMBERS, trained_parameters),
    Cost("extra", "numbers held beside the model", NUMBERS, _spent("extra_parameters"), absent=0.0),
    Cost("buffer", "memory of samples and masks", BYTES, _spent("buffer_bytes"), absent=0.0),
)  # fmt: skip


def pareto_parts(setting: Setting, name: str) -> list[Part]:
    """A plot for every cost that varies, and a table of what is dominated by what."""
    parts: list[Part] = []
    columns: dict[str, dict[str, str]] = {}
    for cost in COSTS:
        points = _points(setting, cost)
        if len(points) < 2 or not _varies([point.x for point in points]):
            continue
        higher = setting.groups[0].runs[0].higher_is_better
        best = _front(setting, points, higher)
        divisor, unit = _unit(cost.units, max(point.x for point in points))
        label = f"{cost.title} ({unit})" if unit else cost.title
        svg = scatter(points, best, label, setting.metric, f"{name}-pareto-{cost.name}", divisor)
        reading = (
            f"Average {words(setting.metric)} and {cost.title}, means over seeds, bars: 95 % intervals. Filled and joined: no "
            "other group is at least as good in both and better in one (bounds aside)."
        )
        parts.append(Figure(f"Average {words(setting.metric)} against {cost.title}", svg, reading))
        columns[cost.title] = {
            p.label: "a bound" if setting.groups[p.number].is_bound else _beaten(i, points, best, higher)
            for i, p in enumerate(points)
        }
    if columns:
        rows = [[g.label, *(column.get(g.label, NONE) for column in columns.values())] for g in setting.groups]
        caption = f"Trade-offs of average {words(setting.metric)} with each cost: on the Pareto front, or which group is better in both"
        parts.append(Table(caption, ["strategy", *columns], rows, prose=True, folded=len(rows) > 12))
    return parts


def front(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> list[int]:
    """Indices of the points (cost, score) that no other dominates: at most its cost, at least its score, one of them
    better. In ascending cost."""
    return sorted(
        (i for i, point in enumerate(points) if not any(_dominates(q, point, higher_is_better) for q in points)),
        key=lambda i: points[i],
    )


def _front(setting: Setting, points: Sequence[Point], higher_is_better: bool) -> list[int]:
    """The front of the continual learners: bounds keep all data, which no cost here counts."""
    own = [i for i, point in enumerate(points) if not setting.groups[point.number].is_bound]
    return [own[i] for i in front([(points[j].x, points[j].y) for j in own], higher_is_better)]


def _dominates(one: tuple[float, float], other: tuple[float, float], higher_is_better: bool) -> bool:
    sign = 1 if higher_is_better else -1
    return one != other and one[0] <= other[0] and sign * one[1] >= sign * other[1]


def _beaten(i: int, points: Sequence[Point], best: Sequence[int], higher_is_better: bool) -> str:
    """What is said of a point: on the front, or the best of those that dominate it."""
    if i in best:
        return "on the front"
    own = (points[i].x, points[i].y)
    over = [points[j] for j in best if _dominates((points[j].x, points[j].y), own, higher_is_better)]
    return f"beaten by {(max if higher_is_better else min)(over, key=lambda p: p.y).label}"


def _points(setting: Setting, cost: Cost) -> list[Point]:
    found = []
    for i, group in enumerate(setting.groups):
        spent = _mean_cost(group, cost)
        scores = values_of(group, "average_accuracy")
        if spent is not None and scores:
            found.append(Point(group.label, spent, mean_std(scores)[0], i, scores))
    return found


def _mean_cost(group: Group, cost: Cost) -> float | None:
    values = [cost.absent if (value := cost.value(run)) is None else value for run in group.runs]
    known = [value for value in values if value is not None]
    return mean_std(known)[0] if known else None


def _varies(values: Sequence[float]) -> bool:
    return max(values) - min(values) > VARIES * max(map(abs, values))


def _unit(units: Units, highest: float) -> tuple[float, str]:
    return next(((size, name) for size, name in reversed(units) if highest >= 2 * size), units[0])
