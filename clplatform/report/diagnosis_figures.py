"""What the diagnosis and the stability gap draw: bars for each experience, and curves over the steps of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from clplatform.report.format import is_share
from clplatform.report.heatmap import labels_of
from clplatform.report.svg import FAINT, SERIES, legend, new_figure, sequence, some, to_svg

MOST_NAMED = 8  # curves with a name each; more are numbered


def bars(
    series: Mapping[str, Sequence[float | None]], names: Sequence[str], ylabel: str, name: str, *,
    highest: float | None = None,
) -> str:  # fmt: skip
    """Bars beside each other for every experience, one for each series; a value that is not there leaves its place empty."""
    figure, axes = new_figure(min(max(1.1 * len(names) + 2.2, 5.4), 9.0), 3.3)
    x, width = np.arange(len(names)), 0.8 / max(len(series), 1)
    for i, (label, values) in enumerate(series.items()):
        heights = [np.nan if v is None else v for v in values]
        axes.bar(x + (i - (len(series) - 1) / 2) * width, heights, 0.92 * width, color=SERIES[i], label=label)
    ticks = some(len(names), 15)
    labels = labels_of(names, ticks, 1, numbers=len(names) > 15)
    turned = max(map(len, labels), default=0) > 8
    axes.set_xticks(ticks, labels, rotation=30 if turned else 0, ha="right" if turned else "center")
    if highest is not None:
        axes.set_ylim(0, highest)
    axes.set(xlabel="experience", ylabel=ylabel)
    legend(axes, list(series))
    return to_svg(figure, name, f"{ylabel} of each experience: {', '.join(series)}")


def curves(
    points: Mapping[str, Sequence[tuple[int, float]]], boundaries: Sequence[int], metric: str, ylabel: str, name: str
) -> str:
    """A curve for each experience over the optimizer steps; dashed lines are where an experience ends."""
    figure, axes = new_figure(9.0, 3.6)
    scale, many = (100 if is_share(metric) else 1), len(points) > MOST_NAMED
    for color, (label, values) in zip(sequence(len(points)), points.items(), strict=True):
        steps, scores = np.array(values, dtype=float).reshape(-1, 2).T
        axes.plot(steps, scale * scores, color=color, linewidth=1.3, marker=".", markersize=3, label=label)
    for step in boundaries:
        axes.axvline(step, color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
    if is_share(metric):
        axes.set_ylim(0, 103)
    axes.set(xlabel="optimizer steps of the whole run", ylabel=ylabel)
    shown = [str(i + 1) for i in range(len(points))] if many else list(points)
    legend(axes, shown, title="experience" if many else None)
    return to_svg(figure, name, f"{ylabel} of each experience while later ones are learned"[:400])
