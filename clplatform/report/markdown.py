"""A document as Markdown (GitHub's): everything but the figures, whose numbers are in the tables."""

from __future__ import annotations

import re

from clplatform.report.document import Code, Document, Part, Points, Table, Text


def render_markdown(document: Document) -> str:
    """The document as text."""
    lines = [f"# {escape(document.title)}", "", escape(document.subtitle), ""]
    if document.status:
        lines += [f"**Status: {document.status}**", ""]
    if document.banner:
        lines += [*(f"> {escape(line)}  " for line in document.banner.splitlines()), ""]
    lines += [f"- {escape(name)}: {escape(value)}" for name, value in document.facts] + [""]
    if document.headlines:
        rows = [(h.label, h.value, h.meaning) for h in document.headlines]
        lines += [*_grid(Table("", ("", "value", "meaning"), rows, prose=True)), ""]
    for section in document.sections:
        body = [line for part in section.parts for line in _part(part)]
        if body:
            lines += [f"## {escape(section.title)}", "", *body]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _part(part: Part) -> list[str]:
    if isinstance(part, Text):
        return [escape(part.text), ""]
    if isinstance(part, Points):
        return [*(f"- {escape(item)}" for item in part.items), ""]
    if isinstance(part, Table):
        return [f"**{escape(part.caption)}**", "", *_grid(part), ""]
    if isinstance(part, Code):
        longest = max((len(ticks) for ticks in re.findall(r"`+", part.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return [f"**{escape(part.caption)}**", "", fence + part.language, part.text.rstrip("\n"), fence, ""]
    return []


def _grid(table: Table) -> list[str]:
    align = [":--"] + [":--" if table.prose else "--:"] * (len(table.header) - 1)
    rows = [[escape(cell) for cell in row] for row in table.rows]
    for number, address in table.links.items():
        rows[number][0] = f"[{rows[number][0]}]({address.replace(' ', '%20')})"
    return [f"| {' | '.join(row)} |" for row in ([escape(cell) for cell in table.header], align, *rows)]


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    # An underscore inside a word is safe, and names are full of them.
    return re.sub(r"([\\`*<>\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))
