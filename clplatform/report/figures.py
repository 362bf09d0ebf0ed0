"""The figures of a report: data in, inline SVG out. Values are fractions, or whatever the primary metric is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clplatform.report.format import is_share, shorten
from clplatform.report.svg import FAINT, INK, MARKERS, SERIES, contrast, new_figure, sequence, style, tidy, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Sequence[float | None]]
MOST_NUMBERS = 15  # a heat map with more columns has no room for numbers
MOST_NAMED = 8  # lines with a name each; more are numbered
MOST_POINTS = 250  # of a curve; more are drawn as means over equal stretches of steps


def matrix_map(rows: Rows, names: Sequence[str], metric: str, name: str = "matrix", *, small: bool = False) -> str:
    """The matrix as a heat map; cells without meaning stay blank."""
    values = _values(rows, metric)
    n = values.shape[1]
    width = 3.4 if small else min(max(0.62 * n + 2.1, 4.6), 9.0)
    figure, axes = new_figure(width, width * 0.86 if small else min(max(0.42 * len(values) + 1.3, 2.8), 7.5))
    _heat(axes, values, 0, 100 if is_share(metric) else None, cells=n <= (8 if small else MOST_NUMBERS))
    ticks = _some(n, 8 if small else 25)
    labels = [str(i + 1) if small or n > MOST_NUMBERS else shorten(names[i], 12) for i in ticks]
    turned = max(map(len, labels), default=0) > 6
    axes.set_xticks(ticks, labels, rotation=35 if turned else 0, ha="right" if turned else "center")
    rows_at = _some(len(values), 8 if small else 26)
    axes.set_yticks(rows_at, [str(i) if i or small else "0 (untrained)" for i in rows_at])
    axes.set(xlabel="evaluated on experience", ylabel="trained up to experience")
    return to_svg(figure, name, f"Heat map of {metric}: rows after training up to an experience, columns experiences")


def lines(
    series: Mapping[str, Sequence[float | None]],
    first: int,
    metric: str,
    ylabel: str,
    name: str,
    *,
    ordered: bool = False,
    bands: Mapping[str, Sequence[float | None]] | None = None,
    wide: bool = False,
) -> str:
    """One line for each series over the number of experiences learned (from `first`).

    Args:
        ordered: the series are experiences, so that colours follow their order.
        bands: half the height of a band around a line (standard deviations).
    """
    many = ordered and len(series) > MOST_NAMED
    figure, axes = new_figure(9.0, 3.8) if many or wide else new_figure()
    scale = 100 if is_share(metric) else 1
    colors = sequence(len(series)) if ordered else [SERIES[i % len(SERIES)] for i in range(len(series))]
    last = first
    for i, (label, values) in enumerate(series.items()):
        y = scale * np.array([np.nan if v is None else v for v in values], dtype=float)
        x = np.arange(first, first + len(y))
        last = max(last, first + len(y) - 1)
        axes.plot(x, y, color=colors[i], marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1.6, label=label)
        if bands and label in bands:
            half = scale * np.array([np.nan if v is None else v for v in bands[label]], dtype=float)
            axes.fill_between(x, y - half, y + half, color=colors[i], alpha=0.18, linewidth=0)
    axes.set_xticks([first + i for i in _some(last - first + 1, 12)])
    axes.set(xlabel="experiences learned", ylabel=ylabel)
    if first == 1 and is_share(metric):
        axes.set_ylim(0, 103)  # the same scale in every report: small differences look small
    elif first > 1:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=max(1e-9, axes.get_ylim()[1]))
    if many:
        _legend(axes, [str(i + 1) for i in range(len(series))], title="experience")
    elif len(series) > 1:
        _legend(axes, list(series))
    return to_svg(figure, name, f"{ylabel} over the number of experiences learned, for {', '.join(series)}"[:400])


def losses(log: Sequence[Mapping[str, Any]], name: str = "losses") -> str | None:
    """Every logged loss term over the steps of the run; None if nothing was logged."""
    terms = loss_terms(log)
    if not terms:
        return None
    figure, axes = new_figure(7.6, 3.3)
    positive = []
    for i, (term, points) in enumerate(terms.items()):
        steps, values = thin(np.array(list(points)), np.array(list(points.values())))
        positive.append(values[values > 0])
        label = term.removeprefix("train/")
        color = INK if label == "loss" else SERIES[i % len(SERIES)]
        axes.plot(steps, values, color=color, linewidth=1.6 if label == "loss" else 1.2, label=label, zorder=3 - i / 99)
    for step in boundaries(log):
        axes.axvline(step, color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
    found = np.concatenate(positive) if positive else np.zeros(0)
    if found.size and found.max() > 1e3 * max(np.median(found), 1e-12):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set(xlabel="optimizer steps of the whole run", ylabel="loss")
    if len(terms) > 1:
        _legend(axes, list(terms))
    return to_svg(figure, name, f"Training loss over steps: {', '.join(terms)}")


def loss_terms(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Term → step → value. A step logged twice (after a resume) counts as it was logged last."""
    terms: dict[str, dict[int, float]] = {}
    for row in log:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for key, value in row.items():
            finite = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
            if key.startswith("train/") and key != "train/lr" and finite:
                terms.setdefault(key, {})[step] = float(value)
    # The first term in a chain with one: the sum says the same.
    if set(terms) == {"train/loss", "train/task"} and terms["train/loss"] == terms["train/task"]:
        del terms["train/task"]
    order = sorted(terms, key=lambda t: (t != "train/loss", t != "train/task", t))
    return {term: dict(sorted(terms[term].items())) for term in order}


def boundaries(log: Sequence[Mapping[str, Any]]) -> list[int]:
    """The first step of every experience but the first."""
    first: dict[int, int] = {}
    for row in log:
        step, experience = row.get("step"), row.get("experience")
        logged = any(str(key).startswith("train/") for key in row)
        if isinstance(step, int) and isinstance(experience, int) and logged:
            first[experience] = min(step, first.get(experience, step))
    return [first[e] for e in sorted(first)[1:]]


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points in the order of steps: means over stretches of the same number of points."""
    order = np.argsort(steps)
    steps, values = steps[order].astype(float), values[order].astype(float)
    if len(steps) <= MOST_POINTS:
        return steps, values
    length = -(-len(steps) // MOST_POINTS)
    starts = np.arange(0, len(steps), length)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def time_bars(timing: Sequence[Mapping[str, Any]], name: str = "timing") -> str:
    """Seconds of every experience, stacked: training, consolidation, evaluation."""
    figure, axes = new_figure()
    x, bottom = np.arange(1, len(timing) + 1), np.zeros(len(timing))
    for i, phase in enumerate(phases(timing)):
        height = np.array([float(times.get(phase) or 0.0) for times in timing])
        axes.bar(x, height, 0.7, bottom=bottom, color=SERIES[i % len(SERIES)], label=phase)
        bottom += height
    axes.set_xticks([1 + i for i in _some(len(timing), 15)])
    axes.set(xlabel="experience", ylabel="seconds")
    _legend(axes, phases(timing))
    return to_svg(figure, name, "Seconds spent on each experience, by phase")


def phases(timing: Sequence[Mapping[str, Any]]) -> list[str]:
    """The phases that were timed, the usual ones first."""
    names = list(dict.fromkeys(phase for times in timing for phase in times))
    return sorted(names, key=["train", "consolidate", "evaluate", *names].index)


def confusion_map(counts: np.ndarray, names: Sequence[str], starts: Sequence[int], name: str = "confusion") -> str:
    """The confusion matrix with rows in percent of their class; lines separate the experiences.

    Args:
        counts: [K, K], rows true.
        starts: number of the first class of every experience but the first.
    """
    k = len(counts)
    totals = counts.sum(1, keepdims=True)
    # No samples: blank, so that the page stays light and mistakes stand out.
    share = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=counts > 0)
    side = min(max(0.34 * k + 2.0, 4.2), 7.0)
    figure, axes = new_figure(side, side * 0.88)
    _heat(axes, share, 0, 100, cells=k <= 12)
    ticks = _some(k, 20)
    labels = [shorten(names[i], 12) if k <= 20 and i < len(names) else str(i) for i in ticks]
    axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels), default=0) > 2 else 0)
    axes.set_yticks(ticks, labels)
    for start in starts:
        axes.axhline(start - 0.5, color=FAINT, linewidth=0.8)
        axes.axvline(start - 0.5, color=FAINT, linewidth=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    return to_svg(figure, name, f"Confusion matrix of {k} classes after the last experience")


def _heat(axes: Axes, values: np.ndarray, low: float | None, high: float | None, *, cells: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    known = values[~np.isnan(values)]
    norm = Normalize(
        low if high is not None else (known.min() if known.size else 0.0),
        high if high is not None else (known.max() if known.size else 1.0),
    )
    # Without viridis' darkest part, which would vanish on a dark page.
    shades = colormaps["viridis"](np.linspace(0.18, 1, 256))
    colors = LinearSegmentedColormap.from_list("heat", shades).with_extremes(bad=(0, 0, 0, 0))
    if values.size <= 700:  # vector cells stay sharp; many are smaller as a picture
        edges = [np.arange(s + 1) - 0.5 for s in values.shape]
        image = axes.pcolormesh(edges[1], edges[0], np.ma.masked_invalid(values), cmap=colors, norm=norm)
    else:
        image = axes.imshow(values, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    axes.grid(False)
    for i, j in zip(*np.nonzero(~np.isnan(values)), strict=True) if cells else ():
        text = f"{values[i, j]:.0f}" if high is not None else f"{values[i, j]:.3g}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color=contrast(colors(norm(values[i, j]))))
    if not cells:
        with style():
            bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=INK, color=FAINT)
        if high is not None:
            bar.ax.yaxis.set_major_formatter("{x:.0f} %")
    tidy_spines(axes)


def tidy_spines(axes: Axes) -> None:
    """A thin frame all around: blank cells belong to the map too."""
    tidy(axes).grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _legend(axes: Axes, labels: Sequence[str], title: str | None = None) -> None:
    columns = -(-len(labels) // 13)
    handles, _ = axes.get_legend_handles_labels()
    short = [shorten(label.removeprefix("train/"), 38 if columns == 1 else 12) for label in labels]
    with style():
        axes.figure.legend(
            handles, short, loc="outside right upper", ncols=columns, handlelength=1.4, labelspacing=0.35, title=title
        )


def _values(rows: Rows, metric: str) -> np.ndarray:
    values = np.array([[np.nan if v is None else float(v) for v in row] for row in rows], dtype=float)
    return 100 * values if is_share(metric) else values


def _some(n: int, most: int) -> list[int]:
    """At most about `most` of 0 … n−1, evenly spaced."""
    return list(range(0, n, max(-(-n // most), 1)))
