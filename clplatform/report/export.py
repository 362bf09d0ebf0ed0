"""Figures as files for a paper: SVG and PDF, in the colours of a white page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clplatform.report.document import Document
from clplatform.report.document import Figure as Part
from clplatform.report.svg import FAINT, INK, Drawing, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK_ON_PAPER, FAINT_ON_PAPER = "#1c2430", "#c3c9d1"
# What an earlier comparison may have left in the folder.
OURS = re.compile(r"^(setting-\d+|ranking)-[a-z0-9-]+\.(svg|pdf)$")


def figure_files(document: Document) -> Iterator[tuple[str, bytes]]:
    """Name and content of every figure, as SVG and as PDF."""
    for section in document.sections:
        for part in section.parts:
            if isinstance(part, Part) and isinstance(part.svg, Drawing):
                yield f"{part.svg.name}.svg", standalone(part.svg).encode()
                yield f"{part.svg.name}.pdf", to_pdf(part.svg.figure)


def clear(folder: Path, keep: set[str]) -> None:
    """Delete the figures of an earlier comparison that this one does not have."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if OURS.match(path.name) and path.name not in keep:
            path.unlink()


def standalone(drawing: str) -> str:
    """An `<svg>` element of a page as a file of its own."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    size = f' width="{box[1]}pt" height="{box[2]}pt"' if box else ""
    text = re.sub(r' style="--width: [^"]*"', "", drawing, count=1)
    look = "stroke-linejoin: round; stroke-linecap: butt"
    text = text.replace("<svg ", f'<svg {names}{size} style="{look}" ', 1).replace(' href="#', ' xlink:href="#')
    text = text.replace("currentColor", INK_ON_PAPER).replace("var(--faint, #8888)", FAINT_ON_PAPER)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def to_pdf(figure: Figure) -> bytes:
    """The figure as a PDF with text that can be searched; the same figure gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    _on_paper(figure)
    FigureCanvasPdf(figure)
    buffer = io.BytesIO()
    with style(), rc_context({"pdf.fonttype": 42}):
        figure.savefig(buffer, format="pdf", transparent=True, metadata={"CreationDate": None, "Creator": "clplatform"})
    return buffer.getvalue()


def _on_paper(figure: Figure) -> None:
    """Turn the placeholder colours into those of a white page."""
    from matplotlib.collections import Collection
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    paper = {INK: INK_ON_PAPER, FAINT: FAINT_ON_PAPER}

    def turned(color: object) -> str | None:
        try:
            return paper.get(to_hex(color))  # type: ignore[arg-type]
        except (TypeError, ValueError):  # no colour, or several
            return None

    for artist in figure.findobj():
        if isinstance(artist, Line2D | Text):
            if new := turned(artist.get_color()):
                artist.set_color(new)
            if isinstance(artist, Line2D) and (new := turned(artist.get_markeredgecolor())):
                artist.set_markeredgecolor(new)
        elif isinstance(artist, Patch | Collection) and (new := turned(artist.get_edgecolor())):
            artist.set_edgecolor(new)
