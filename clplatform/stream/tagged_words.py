"""Sentences whose words are tagged, from CoNLL columns or JSONL; tags of spans are brought into IOB2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplatform.metric.spans import OUTSIDE
from clplatform.stream.tables import read_table, read_text
from clplatform.stream.text_files import check_text
from clplatform.types import ClplatformError

# In IOB1, IOB2, IOBES and BILOU.
SPAN = re.compile(r"([BIESLUM])-(.+)", re.DOTALL)
TABLES = (".jsonl", ".ndjson", ".parquet")


@dataclass
class Sentences:
    """Tagged sentences of one file.

    Args:
        words, tags: of each sentence; as many tags as words, and one at least.
        lines: where each begins in the file, for messages.
        experiences: names of the experiences they belong to, if a key says so.
    """

    path: str
    words: list[list[str]]
    tags: list[list[str]]
    lines: Sequence[int]
    experiences: list[str] | None = None

    def __len__(self) -> int:
        return len(self.words)

    def where(self, i: int) -> str:
        return f"{self.path}:{self.lines[i]}"

    def select(self, rows: Sequence[int], path: str) -> Sentences:
        """Some of them, under this name."""
        experiences = None if self.experiences is None else [self.experiences[i] for i in rows]
        words, tags = ([values[i] for i in rows] for values in (self.words, self.tags))
        return Sentences(path, words, tags, [self.lines[i] for i in rows], experiences)

    def types(self) -> list[str]:
        """Types of spans, or else tags, in the order of appearance, without `O`."""
        return list(dict.fromkeys(type_of(tag) for tags in self.tags for tag in tags if tag != OUTSIDE))

    def marks_spans(self) -> bool:
        """Are all tags those of spans, such as `B-PER` and `O`?"""
        return all(tag == OUTSIDE or SPAN.fullmatch(tag) for tags in self.tags for tag in tags)


@dataclass(frozen=True)
class Format:
    """Where words and tags stand.

    Args:
        tokens, tags: keys of JSONL and Parquet.
        experience: key that names a row's experience; None: there is none.
        token_column, tag_column: of CoNLL files, from 0, or from the end (−1 is the last).
    """

    tokens: str
    tags: str
    experience: str | None
    token_column: int
    tag_column: int


def type_of(tag: str) -> str:
    """`PER` of `B-PER`; a tag that marks no span is its own type."""
    match = SPAN.fullmatch(tag)
    return match[2] if match else tag


def iob2(tags: Sequence[str]) -> list[str]:
    """The tags of a sentence in IOB2: every span begins with `B-`."""
    found, before = [], ""
    for tag in tags:
        match = SPAN.fullmatch(tag)
        if match is None:
            found.append(tag)
            before = ""
            continue
        begins = match[1] in "BSU" or match[2] != before
        found.append(f"{'B' if begins else 'I'}-{match[2]}")
        before = "" if match[1] in "ESLU" else match[2]
    return found


def read_sentences(path: str, form: Format) -> Sentences:
    """The tagged sentences of a file.

    Raises:
        ClplatformError: the file is missing or malformed, or a sentence has no word or other numbers of words and tags; with
            the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ClplatformError(f"{path} is a folder, not a file" if file.is_dir() else f"there is no file {path}")
    found = _rows(path, form) if file.suffix.lower() in TABLES else _columns(path, read_text(file), form)
    if not len(found):
        raise ClplatformError(f"{path} holds no sentence")
    for i, (words, tags) in enumerate(zip(found.words, found.tags, strict=True)):
        for what, values in (("a word", words), ("a tag", tags)):
            for value in values:
                check_text(found.where(i), what, value)
        if len(words) != len(tags) or not words:
            raise ClplatformError(f"{found.where(i)}: {len(words)} words and {len(tags)} tags; each word needs one")
    return found


def _rows(path: str, form: Format) -> Sentences:
    """JSONL or Parquet: a list of words and one of tags in each row."""
    table = read_table(path, [form.tokens, form.tags, *([form.experience] if form.experience else [])])
    for key in (form.tokens, form.tags):
        for line, value in zip(table.lines, table.columns[key], strict=True):
            if not isinstance(value, list):
                raise ClplatformError(f"{path}:{line}: {key!r} is {value!r}, not a list")
            if key == form.tags and any(isinstance(tag, int) for tag in value):
                raise ClplatformError(f"{path}:{line}: the tags are numbers; write their names, such as B-PER and O")
    experiences = [str(v) for v in table.columns[form.experience]] if form.experience else None
    return Sentences(path, table.columns[form.tokens], table.columns[form.tags], table.lines, experiences)


def _columns(path: str, content: str, form: Format) -> Sentences:
    """A line for each word, an empty one after each sentence."""
    if form.experience:
        raise ClplatformError(
            f"stream.experience_key={form.experience}: {path} has columns without names; give JSONL, or a file for each "
            "experience"
        )
    words, tags, lines = [], [], []
    for first, rows in _blocks(content):
        cells = [(n, row.split("\t") if "\t" in row else row.split()) for n, row in rows]
        words.append([_cell(path, n, row, form.token_column) for n, row in cells])
        tags.append([_cell(path, n, row, form.tag_column) for n, row in cells])
        lines.append(first)
    return Sentences(path, words, tags, lines)


def _blocks(content: str) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Sentences: their first line, and their lines with numbers. Lines that begin a document are no words."""
    block: list[tuple[int, str]] = []
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            block.append((number, line.strip("\r")))
        elif block:
            yield block[0][0], block
            block = []


def _cell(path: str, number: int, row: list[str], column: int) -> Any:
    if len(row) < 2 or not -len(row) <= column < len(row):
        raise ClplatformError(
            f"{path}:{number}: the line has {len(row)} columns ({' '.join(row)[:40]!r}): a word and its tag are needed, at "
            "stream.token_column and stream.tag_column"
        )
    return row[column].strip()
