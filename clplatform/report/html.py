"""A document as one HTML file that needs nothing else: no script, no font, no request."""

from __future__ import annotations

import re
from pathlib import Path

from clplatform.report.document import Document

TEMPLATES = Path(__file__).parent / "template"


def render_html(document: Document) -> str:
    """The page. Everything but the figures' SVG is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["formula"] = _formula
    return environment.get_template("report.html.jinja").render(document=document)


def _formula(text: str) -> str:
    """Escaped text with `_x` and `_{…}` as subscripts."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"_\{([^}]*)\}|_(\w)", lambda m: f"<sub>{m[1] or m[2]}</sub>", str(escape(text))))
