"""Curves and bars as inline SVG. Values are fractions, or whatever the primary metric is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clplatform.metric.score import full_scale
from clplatform.report.format import is_share
from clplatform.report.svg import MARKERS, SERIES, Drawing, legend, new_figure, sequence, some, to_svg

if TYPE_CHECKING:
    from clplatform.metric.statistics import Interval

MOST_NAMED = 8  # lines with a name each; more are numbered


def lines(
    series: Mapping[str, Sequence[float | None]],
    first: int,
    metric: str,
    ylabel: str,
    name: str,
    *,
    ordered: bool = False,
    samples: Mapping[str, Sequence[Sequence[float | None]]] | None = None,
    bands: Mapping[str, Sequence[Interval | None]] | None = None,
    wide: bool = False,
) -> Drawing:
    """One line for each series over the number of experiences learned (from `first`).

    Args:
        ordered: the series are experiences, so that colours follow their order.
        samples: what a series is the mean of (seeds), drawn as thin lines behind it.
        bands: how sure the values of a series are, drawn as an area behind it.
    """
    many = ordered and len(series) > MOST_NAMED
    figure, axes = new_figure(9.0, 3.8) if many or wide else new_figure()
    scale = 100 if is_share(metric) else 1
    colors = sequence(len(series)) if ordered else [SERIES[i % len(SERIES)] for i in range(len(series))]
    dashes = ["-" if ordered else ("-", "--", ":", "-.")[i // len(SERIES) % 4] for i in range(len(series))]
    last = first
    for i, (label, values) in enumerate(series.items()):
        x = np.arange(first, first + len(values))
        last = max(last, first + len(values) - 1)
        for sample in (samples or {}).get(label, ()):
            axes.plot(x, scale * _array(sample), color=colors[i], linewidth=0.8, alpha=0.45)
        if label in (bands or {}):
            ends = np.array([(b.low, b.high) if b else (np.nan, np.nan) for b in (bands or {})[label]]).T
            axes.fill_between(x, *(scale * ends), color=colors[i], alpha=0.16, linewidth=0)
        look: dict[str, Any] = {"color": colors[i], "linestyle": dashes[i], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(x, scale * _array(values), **look, markersize=4, linewidth=1.7, label=label, zorder=3)
    axes.set_xticks([first + i for i in some(last - first + 1, 12)])
    axes.set(xlabel="experiences learned", ylabel=ylabel)
    if first == 1 and is_share(metric):
        # The same scale in every report: small differences look small.
        axes.set_ylim(0, 1.03 * full_scale(metric, max(axes.dataLim.y1, 0.0)))
    elif first > 1:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=max(1e-9, axes.get_ylim()[1]))
    if many:
        legend(axes, [str(i + 1) for i in range(len(series))], title="experience")
    elif len(series) > 1:
        legend(axes, list(series))
    return to_svg(figure, name, f"{ylabel} over the number of experiences learned, for {', '.join(series)}"[:400])


def time_bars(timing: Sequence[Mapping[str, Any]], name: str = "timing") -> str:
    """Seconds of every experience, stacked: training, consolidation, evaluation."""
    figure, axes = new_figure()
    x, bottom = np.arange(1, len(timing) + 1), np.zeros(len(timing))
    for i, phase in enumerate(phases(timing)):
        height = np.array([float(times.get(phase) or 0.0) for times in timing])
        axes.bar(x, height, 0.7, bottom=bottom, color=SERIES[i % len(SERIES)], label=phase)
        bottom += height
    axes.set_xticks([1 + i for i in some(len(timing), 15)])
    axes.set(xlabel="experience", ylabel="seconds")
    legend(axes, phases(timing))
    return to_svg(figure, name, "Seconds spent on each experience, by phase")


def phases(timing: Sequence[Mapping[str, Any]]) -> list[str]:
    """The phases that were timed, the usual ones first."""
    names = list(dict.fromkeys(phase for times in timing for phase in times))
    return sorted(names, key=["train", "consolidate", "evaluate", *names].index)


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)
