"""Heat maps as inline SVG: the accuracy matrix and confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from clplatform.metric.score import full_scale
from clplatform.report.format import is_share, shorten
from clplatform.report.svg import FAINT, INK, contrast, new_figure, some, style, tidy, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Sequence[float | None]]
MOST_NUMBERS = 15  # a heat map with more columns has no room for numbers


def matrix_map(
    rows: Rows,
    names: Sequence[str],
    metric: str,
    name: str = "matrix",
    *,
    small: bool = False,
    higher_is_better: bool = True,
) -> str:
    """The matrix as a heat map, the better the brighter; cells without meaning stay blank."""
    values = _values(rows, metric)
    n = values.shape[1]
    width = 3.4 if small else min(max(0.62 * n + 2.1, 4.6), 9.0)
    figure, axes = new_figure(width, width * 0.86 if small else min(max(0.42 * len(values) + 1.3, 2.8), 7.5))
    cells = n <= (8 if small else MOST_NUMBERS)
    high = full_scale(metric, values[~np.isnan(values)].max(initial=0.0)) if is_share(metric) else None
    _heat(axes, values, 0, high, cells=cells, bright_is_high=higher_is_better)
    ticks = some(n, 8 if small else 25)
    labels = labels_of(names, ticks, 1, numbers=small or n > MOST_NUMBERS)
    turned = max(map(len, labels), default=0) > 6
    axes.set_xticks(ticks, labels, rotation=35 if turned else 0, ha="right" if turned else "center")
    rows_at = some(len(values), 8 if small else 26)
    axes.set_yticks(rows_at, [str(i) if i or small else "0 (untrained)" for i in rows_at])
    axes.set(xlabel="evaluated on experience", ylabel="trained up to experience")
    return to_svg(figure, name, f"Heat map of {metric}: rows after training up to an experience, columns experiences")


def labels_of(names: Sequence[str], ticks: Sequence[int], first: int, *, numbers: bool = False) -> list[str]:
    """Short names of some ticks; their numbers (counted from `first`) where short names could not be told apart."""
    short = [shorten(names[i], 12) if i < len(names) else str(i + first) for i in ticks]
    return [str(i + first) for i in ticks] if numbers or len(set(short)) < len(short) else short


def confusion_map(
    counts: np.ndarray,
    names: Sequence[str],
    starts: Sequence[int] = (),
    name: str = "confusion",
    *,
    what: str = "class",
) -> str:
    """The confusion matrix with rows in percent of their sum; lines separate the experiences.

    Args:
        counts: [K, K], rows true.
        starts: number of the first class of every experience but the first.
        what: rows and columns are (`class` or `experience`).
    """
    k = len(counts)
    totals = counts.sum(1, keepdims=True)
    # No samples: blank, so that the page stays light and mistakes stand out.
    share = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=counts > 0)
    side = min(max(0.34 * k + 2.0, 4.2), 7.0)
    figure, axes = new_figure(side, side * 0.88)
    _heat(axes, share, 0, 100, cells=k <= MOST_NUMBERS)
    ticks = some(k, 20)
    labels = labels_of(names, ticks, 0 if what == "class" else 1, numbers=k > 20)
    axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels), default=0) > 2 else 0)
    axes.set_yticks(ticks, labels)
    for start in starts:
        axes.axhline(start - 0.5, color=FAINT, linewidth=0.8)
        axes.axvline(start - 0.5, color=FAINT, linewidth=0.8)
    axes.set(xlabel=f"predicted {what}", ylabel=f"true {what}")
    plural = {"class": "classes"}.get(what, f"{what}s")
    return to_svg(figure, name, f"Confusion matrix of {k} {plural} after the last experience")


def layer_map(
    values: Sequence[Sequence[float | None]], layers: Sequence[str], names: Sequence[str], name: str, label: str
) -> str:
    """Shares in percent: a row for each layer of the model from input to output, a column for each experience."""
    cells = np.array([[np.nan if v is None else round(100 * v) for v in row] for row in values], dtype=float)
    n = cells.shape[1]
    figure, axes = new_figure(min(max(0.62 * n + 2.3, 4.4), 9.0), min(max(0.34 * len(layers) + 1.3, 2.4), 7.0))
    _heat(axes, cells, 0, 100, cells=n <= MOST_NUMBERS)
    ticks, rows = some(n, 20), some(len(layers), 26)
    labels = labels_of(names, ticks, 1, numbers=n > MOST_NUMBERS)
    turned = max(map(len, labels), default=0) > 6
    axes.set_xticks(ticks, labels, rotation=35 if turned else 0, ha="right" if turned else "center")
    axes.set_yticks(rows, [shorten(layers[i], 20) for i in rows])
    axes.set(xlabel="experience", ylabel="layer, input first")
    return to_svg(figure, name, label)


def _heat(
    axes: Axes, values: np.ndarray, low: float, high: float | None, *, cells: bool, bright_is_high: bool = True
) -> None:
    """Draw `values` on a scale from `low` to `high`, or from the least to the greatest where `high` is None."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    known = values[~np.isnan(values)]
    norm = Normalize(
        low if high is not None else (known.min() if known.size else 0.0),
        high if high is not None else (known.max() if known.size else 1.0),
    )
    # Without viridis' darkest part, which would vanish on a dark page.
    shades = colormaps["viridis"](np.linspace(0.18, 1, 256))[:: 1 if bright_is_high else -1]
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
        axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color=contrast(tuple(colors(norm(values[i, j])))))
    if not cells:
        with style():
            bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=INK, color=FAINT)
        if high is not None:
            bar.ax.yaxis.set_major_formatter("{x:.0f} %")
    _frame(axes)


def _frame(axes: Axes) -> None:
    """A thin frame all around: blank cells belong to the map too."""
    tidy(axes).grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _values(rows: Rows, metric: str) -> np.ndarray:
    values = np.array([[np.nan if v is None else float(v) for v in row] for row in rows], dtype=float)
    return 100 * values if is_share(metric) else values
