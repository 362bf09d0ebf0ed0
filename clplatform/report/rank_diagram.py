"""The critical difference diagram of Demšar 2006 (Figure 1) as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clplatform.metric.statistics import Ranking
from clplatform.report.format import shorten
from clplatform.report.svg import FAINT, INK, SERIES, new_figure, to_svg


def rank_diagram(labels: Sequence[str], ranking: Ranking, name: str) -> str:
    """Groups on an axis of average ranks; bars join those that differ by less than the critical difference."""
    order = [int(i) for i in np.argsort(ranking.average, kind="stable")]
    ranks, k = [float(ranking.average[i]) for i in order], len(labels)
    bars = cliques(ranks, ranking.critical_difference)
    half = (k + 1) // 2
    lowest = -0.5 * len(bars) - 0.9 - 0.8 * half
    figure, axes = new_figure(8.2, 0.9 + 0.22 * (1.6 - lowest))
    axes.set_axis_off()
    axes.set_xlim(1 - 0.32 * (k - 1), k + 0.32 * (k - 1))
    axes.set_ylim(lowest, 1.8)
    axes.plot([1, k], [0, 0], color=INK, linewidth=1)
    for tick in range(1, k + 1):
        axes.plot([tick, tick], [0, 0.18], color=INK, linewidth=1)
        axes.text(tick, 0.3, str(tick), ha="center", va="bottom", fontsize=9, color=INK)
    for i, (first, last) in enumerate(bars):
        y = -0.5 * (i + 1)
        axes.plot(
            [ranks[first] - 0.03, ranks[last] + 0.03], [y, y], color=SERIES[0], linewidth=3.2, solid_capstyle="round"
        )
    for place, index in enumerate(order):
        left = place < half
        level = place if left else k - 1 - place
        y = -0.5 * len(bars) - 0.8 - 0.8 * level
        side = 1 - 0.03 * (k - 1) if left else k + 0.03 * (k - 1)
        axes.plot([ranks[place], ranks[place], side], [0, y, y], color=FAINT, linewidth=0.9, zorder=1)
        text = (
            f"{shorten(labels[index], 30)}  {ranks[place]:.2f}"
            if left
            else f"{ranks[place]:.2f}  {shorten(labels[index], 30)}"
        )
        axes.text(
            side,
            y,
            f"{text} " if left else f" {text}",
            ha="right" if left else "left",
            va="center",
            fontsize=9,
            color=INK,
        )
    gap = min(ranking.critical_difference, k - 1.0)
    axes.plot([1, 1 + gap], [1.25, 1.25], color=INK, linewidth=1.6)
    beyond = " (longer than the axis)" if gap < ranking.critical_difference else ""
    axes.text(
        1 + gap / 2,
        1.35,
        f"critical difference {ranking.critical_difference:.2f}{beyond}",
        ha="center",
        fontsize=9,
        color=INK,
    )
    return to_svg(
        figure, name, f"Critical difference diagram; from best to worst: {', '.join(labels[i] for i in order)}"[:400]
    )


def cliques(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """First and last place of every maximal run of groups (ascending ranks) that differ by less than `difference`."""
    found: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = max(i for i in range(first, len(ranks)) if ranks[i] - ranks[first] < difference or i == first)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found
