"""Points with names, as inline SVG: the Pareto plots, and values over a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from clplatform.metric.statistics import mean_interval
from clplatform.report.format import is_share, shorten, words
from clplatform.report.svg import INK, MARKERS, SERIES, legend, new_figure, style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

MOST_IN_ANY_CASE = 6
MOST_LABELLED = 12  # names in one plot
NAME_SIZE = 8.5
# Where a name may be, seen from its point, in points: the nearest first.
PLACES = (
    (8, 0), (-8, 0), (0, 10), (0, -10), (8, 8), (8, -8), (-8, 8), (-8, -8), (12, 19), (12, -19), (-12, 19), (-12, -19),
    (14, 31), (14, -31), (-14, 31), (-14, -31),
)  # fmt: skip
DECADES = 10.0  # greatest over least value from which on an axis is logarithmic


@dataclass(frozen=True)
class Point:
    """A group in a plot. `number`: its place among the groups, which gives its colour and marker; `values`: what `y` is the
    mean of."""

    label: str
    x: float
    y: float
    number: int
    values: Sequence[float] = field(default=())


def scatter(
    points: Sequence[Point], front: Sequence[int], xlabel: str, metric: str, name: str, divisor: float = 1.0
) -> str:
    """Points; those of `front` are filled, joined by a line and named, the others hollow (and named where few)."""
    figure, axes = new_figure()
    scale = 100 if is_share(metric) else 1
    spread_x(axes, [p.x / divisor for p in points], ratio=20.0)
    axes.plot(
        [points[i].x / divisor for i in front],
        [scale * points[i].y for i in front],
        color=INK,
        linewidth=0.9,
        alpha=0.6,
    )
    for i, p in enumerate(points):
        color = SERIES[p.number % len(SERIES)]
        _bar(axes, p.x / divisor, p.values, scale, color)
        axes.plot(
            [p.x / divisor], [scale * p.y], linestyle="none", marker=MARKERS[p.number % len(MARKERS)], color=color,
            markersize=8 if i in front else 6, markerfacecolor=color if i in front else "none", zorder=3,
        )  # fmt: skip
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel=xlabel, ylabel=_ylabel(metric))
    named = [*front[-MOST_LABELLED:], *(i for i in range(len(points)) if i not in front)][:MOST_LABELLED]
    _name(figure, axes, [(p.x / divisor, scale * p.y) for p in points], {i: points[i].label for i in named}, front)
    best = ", ".join(points[i].label for i in front)
    return to_svg(figure, name, f"Average {words(metric)} against {xlabel}; on the Pareto front: {best}"[:400])


def over_setting(
    series: Mapping[str, Sequence[tuple[float, Sequence[float]]]], xlabel: str, metric: str, name: str
) -> str:
    """Mean and 95 % interval of the values at every setting, one line for each series (whose name is "" if it is alone)."""
    figure, axes = new_figure()
    scale = 100 if is_share(metric) else 1
    spread_x(axes, [x for points in series.values() for x, _ in points], ratio=DECADES)
    for i, (label, points) in enumerate(series.items()):
        color = SERIES[i % len(SERIES)]
        for x, values in points:
            _bar(axes, x, values, scale, color)
        means = [scale * float(np.mean(values)) for _, values in points]
        axes.plot(
            [x for x, _ in points], means, color=color, marker=MARKERS[i % len(MARKERS)], markersize=5, label=label
        )
    axes.margins(y=0.12)
    axes.set(xlabel=xlabel, ylabel=_ylabel(metric))
    if len(series) > 1:
        legend(axes, list(series))
    return to_svg(figure, name, f"Average {words(metric)} over {xlabel}")


def spread_x(axes: Axes, values: Sequence[float], *, ratio: float) -> None:
    """A logarithmic axis where the values are positive and span `ratio`; with zeros among them one that begins linear."""
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or max(positive) < ratio * min(positive):
        return
    if len(positive) == len(values):
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def _ylabel(metric: str) -> str:
    return f"average {words(metric)}" + (" (%)" if is_share(metric) else "")


def _bar(axes: Axes, x: float, values: Sequence[float], scale: float, color: str) -> None:
    interval = mean_interval(values)
    if interval is not None:
        axes.plot([x, x], [scale * interval.low, scale * interval.high], color=color, linewidth=1.1, alpha=0.7)


def _name(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float]],
    labels: Mapping[int, str],
    front: Sequence[int],
) -> None:
    """Names beside points, each at the nearest place where it covers least. Only those of the front are there in any case,
    of a long one its ends; the others where there is room."""
    from matplotlib.transforms import Bbox

    with style():
        figure.draw_without_rendering()  # the layout decides where the points are
    figure.set_layout_engine("none")
    pixels = axes.transData.transform(points)
    dot = figure.dpi / 72  # pixels of a point
    taken = [Bbox.from_extents(x - 4 * dot, y - 4 * dot, x + 4 * dot, y + 4 * dot) for x, y in pixels]
    must = front if len(front) <= MOST_IN_ANY_CASE else (front[0], front[-1])
    for one, other in zip(front, front[1:], strict=False):  # the line that joins them
        steps = np.linspace(pixels[one], pixels[other], 2 + int(np.abs(pixels[other] - pixels[one]).max() / (6 * dot)))
        taken += [Bbox.from_extents(x - dot, y - dot, x + dot, y + dot) for x, y in steps]
    inside = axes.get_window_extent()
    for i, label in labels.items():
        text = shorten(label, 30)
        width, height = 0.58 * NAME_SIZE * dot * len(text), 1.15 * NAME_SIZE * dot
        boxes = {}
        for dx, dy in PLACES:
            left = pixels[i][0] + dx * dot - (0.5 - 0.5 * float(np.sign(dx))) * width
            boxes[dx, dy] = Bbox.from_bounds(left, pixels[i][1] + dy * dot - height / 2, width, height)
        (dx, dy), box = min(boxes.items(), key=lambda place: _covered(place[1], taken, inside))
        if i not in must and _covered(box, taken, inside) > 0.04 * width * height:
            continue
        taken.append(box)
        axes.annotate(
            text, points[i], xytext=(dx, dy), textcoords="offset points", ha={1: "left", 0: "center", -1: "right"}[np.sign(dx)],
            va="center", fontsize=NAME_SIZE, color=INK, zorder=4,
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4} if abs(dy) > 12 else None,
        )  # fmt: skip


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """Area of what a name would cover, and more for what would lie outside the axes."""
    from matplotlib.transforms import Bbox

    def common(other: Bbox) -> float:
        both = Bbox.intersection(box, other)
        return both.width * both.height if both is not None else 0.0

    return sum(map(common, taken)) + 2 * (box.width * box.height - common(inside))
