"""Matplotlib figures as inline SVG that follows the page: its font, its text colour, dark and light.

Only `Figure` objects are used, never pyplot: no global state, no window system, half the import time.
"""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clplatform.report.format import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colours that become the page's own in `to_svg`.
INK, FAINT = "#010203", "#040506"
# Mid-tones: at least 3 : 1 against white and against the dark page.
SERIES = (
    "#3b82c4", "#d9730d", "#2f9e62", "#c94f4f", "#8d6cc9", "#a0785a", "#c55a9d", "#7f8790", "#948a1f", "#1b98a8",
)  # fmt: skip
MARKERS = "osD^vP*Xh<"
SCALE = 1.18  # of all text: figures are narrow


class Drawing(str):
    """An `<svg>` element for a page that knows its name and the figure it is of, which `export.py` writes as a PDF too."""

    name: str
    figure: Figure


def new_figure(width: float = 5.4, height: float = 3.3) -> tuple[Figure, Axes]:
    """An empty figure (inches) with one axes in the house style."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    return figure, tidy(axes)


def tidy(axes: Axes) -> Axes:
    """Axes with few lines in the page's colours."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.tick_params(colors=INK, color=FAINT, length=3)
    axes.grid(True, axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def style() -> Any:
    """The settings under which figures are made and written."""
    from matplotlib import rc_context

    return rc_context({
        "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
        "svg.hashsalt": "clplatform",  # same figure, same bytes
        "text.color": INK, "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "font.size": 9 * SCALE, "axes.labelsize": 9 * SCALE, "axes.titlesize": 9.5 * SCALE,
        "xtick.labelsize": 8 * SCALE, "ytick.labelsize": 8 * SCALE, "legend.fontsize": 8 * SCALE,
        "legend.frameon": False, "figure.facecolor": "none", "axes.unicode_minus": True,
    })  # fmt: skip


def to_svg(figure: Figure, name: str, label: str) -> Drawing:
    """The figure as an `<svg>` element with unique ids (prefix `name`) and `label` for screen readers."""
    from xml.sax.saxutils import quoteattr

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # found: the same in every other format
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Inside HTML neither namespaces nor the sheet (which would apply to the whole page) are needed.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = text.replace(INK, "currentColor").replace(FAINT, "var(--faint, #8888)")
    width = re.search(r'width="([\d.]+)pt"', text)
    text = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", text, count=1)
    natural = float(width[1]) * 4 / 3 if width else 520.0
    attributes = f'role="img" aria-label={quoteattr(label)} style="--width: {natural:.0f}px"'
    drawing = Drawing(re.sub(r"<svg ", f"<svg {attributes} ", text, count=1).strip())
    drawing.name, drawing.figure = name, figure
    return drawing


def legend(axes: Axes, labels: Sequence[str], title: str | None = None) -> None:
    """Names beside the figure, in columns where they are many."""
    columns = -(-len(labels) // 13)
    handles, _ = axes.get_legend_handles_labels()
    short = [shorten(label.removeprefix("train/"), 38 if columns == 1 else 12) for label in labels]
    with style():
        axes.figure.legend(
            handles, short, loc="outside right upper", ncols=columns, handlelength=1.4, labelspacing=0.35, title=title
        )


def some(n: int, most: int) -> list[int]:
    """At most about `most` of 0 … n−1, evenly spaced."""
    return list(range(0, n, max(-(-n // most), 1)))


def sequence(n: int) -> list[str]:
    """`n` colours in an order that can be seen: from blue over violet and red to orange."""
    steps = [i / max(n - 1, 1) for i in range(n)]
    return [_hex(colorsys.hls_to_rgb(((210 + 180 * t) % 360) / 360, 0.56 - 0.08 * t, 0.62)) for t in steps]


def contrast(color: Sequence[float]) -> str:
    """Black or white, whichever is read better on this colour (r, g, b in 0 … 1)."""
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
    return "#000000" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 else "#ffffff"


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)
