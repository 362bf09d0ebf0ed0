"""What a report says, apart from how it is written: a document of sections that HTML and Markdown both render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its header. `folded`: long, so shown on demand where that exists.
    `half`: narrow enough to stand beside a figure. `prose`: cells are text and not numbers. `formulas`: the column
    whose `_x` and `_{…}` are subscripts. `links`: row number → address for its first cell."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    half: bool = False
    prose: bool = False
    formulas: int | None = None
    links: dict[int, str] = field(default_factory=dict)
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Figure:
    """A figure as inline SVG (which says to screen readers what it shows) with a title and help to read it."""

    title: str
    svg: str
    help: str
    wide: bool = False
    third: bool = False  # small: three stand side by side
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font."""

    caption: str
    text: str
    folded: bool = False
    language: str = ""
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Points:
    """A list of remarks."""

    items: Sequence[str]
    kind: Literal["points"] = "points"


Part: TypeAlias = Text | Table | Figure | Code | Points


@dataclass(frozen=True)
class Section:
    """A part of a document with a heading."""

    name: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Headline:
    """One number that a reader sees first, and what it means."""

    label: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Document:
    """A report.

    Args:
        banner: what a reader must know before any number (the run failed, or still runs); "" if nothing.
        facts: name and value of what the report is about.
    """

    title: str
    subtitle: str
    status: str
    banner: str
    facts: Sequence[tuple[str, str]]
    headlines: Sequence[Headline]
    sections: Sequence[Section]
