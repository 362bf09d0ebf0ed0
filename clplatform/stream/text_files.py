"""Labelled text from files, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplatform.stream.image_files import data_folder, missing
from clplatform.stream.tables import Table, read_table, read_text
from clplatform.types import ClplatformError


@dataclass
class Texts:
    """Labelled texts of one file.

    Args:
        texts: a text, or a pair, for each sample.
        experiences: names of the experiences they belong to, if a column says so.
        lines: of the samples in the file; None: they are counted from 1.

    Raises:
        ClplatformError: there is none, or a text or label is empty or none; with the line.
    """

    path: str
    texts: list[Any]
    labels: list[str]
    experiences: list[str] | None = None
    lines: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise ClplatformError(f"{self.path} holds no sample")
        for i, (text, label) in enumerate(zip(self.texts, self.labels, strict=True)):
            for part in text if isinstance(text, tuple) else (text,):
                check_text(self.where(i), "the text", part)
            check_text(self.where(i), "the label", label)

    def where(self, i: int) -> str:
        return f"{self.path}:{self.lines[i] if self.lines else i + 1}"

    def select(self, rows: Sequence[int], path: str) -> Texts:
        """Some of them, under this name."""
        experiences = None if self.experiences is None else [self.experiences[i] for i in rows]
        lines = [self.lines[i] if self.lines else i + 1 for i in rows]
        return Texts(path, [self.texts[i] for i in rows], [self.labels[i] for i in rows], experiences, lines)

    def joined(self, i: int) -> str:
        text = self.texts[i]
        return text if isinstance(text, str) else " ".join(text)


def check_text(where: str, what: str, value: Any) -> None:
    """Refuse what a tokenizer cannot read, or what says nothing."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN is not itself
        raise ClplatformError(f"{where}: {what} is empty")
    if not isinstance(value, str):
        raise ClplatformError(f"{where}: {what} is {value!r}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ClplatformError(f"{where}: {what} holds half a character ({value[error.start]!a})") from None


def texts_of(table: Table, text_columns: Sequence[str], label_column: str, experience_column: str | None) -> Texts:
    """The rows of a table as labelled texts. Labels and names of experiences may be whole numbers."""
    cells = [
        [_text(table, column, i, value) for i, value in enumerate(table.columns[column])] for column in text_columns
    ]
    texts = cells[0] if len(cells) == 1 else list(zip(*cells, strict=True))
    labels, experiences = (
        [_name(table, column, i, value) for i, value in enumerate(table.columns[column])] if column else None
        for column in (label_column, experience_column)
    )
    return Texts(table.path, texts, labels or [], experiences, table.lines)


def _text(table: Table, column: str, i: int, value: Any) -> str:
    check_text(f"{table.path}:{table.lines[i]}", f"the column {column!r}", value)
    return value


def _name(table: Table, column: str, i: int, value: Any) -> str:
    return _text(table, column, i, str(value) if isinstance(value, int) else value)


def needed_columns(text_columns: Sequence[str], label_column: str, experience_column: str | None) -> list[str]:
    """The columns that are read.

    Raises:
        ClplatformError: there are neither one nor two of text.
    """
    if len(text_columns) not in (1, 2):
        raise ClplatformError(f"stream.text_column={list(text_columns)}: name one column, or two for pairs of texts")
    return [*text_columns, label_column, *([experience_column] if experience_column else [])]


def read_files(path: str, text_columns: Sequence[str], label_column: str, experience_column: str | None) -> Texts:
    """A CSV, TSV, JSONL or Parquet file.

    Raises:
        ClplatformError: the file is missing or malformed, lacks a column, or has an empty cell; with the line.
    """
    table = read_table(path, needed_columns(text_columns, label_column, experience_column))
    return texts_of(table, text_columns, label_column, experience_column)


def clinc150_files(data_dir: str | None) -> tuple[dict[str, Texts], list[str], dict[str, list[str]], int]:
    """Texts of `train`, `val` and `test`; the intents in the order of the training texts; the intents of each domain
    (none without `domains.json`); the number of out-of-scope queries, which are not read.

    Raises:
        ClplatformError: `data_full.json` is missing or malformed.
    """
    folder = data_folder("clinc150", data_dir)
    path = folder / "data_full.json" if folder else None
    if path is None or not path.is_file():
        raise missing("clinc150", "data_full.json (and domains.json)")
    content = read_json(path)
    splits: dict[str, Texts] = {}
    for split in ("train", "val", "test"):
        rows = content.get(split) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise ClplatformError(f"{path} lacks {split!r}: it is not CLINC150's data_full.json")
        for i, row in enumerate(rows, start=1):
            if not isinstance(row, list) or len(row) != 2:
                raise ClplatformError(f"{path}:{split}:{i}: the entry is not a pair [text, intent]")
        splits[split] = Texts(f"{path}:{split}", [r[0] for r in rows], [r[1] for r in rows])
    names = list(dict.fromkeys(splits["train"].labels))
    out_of_scope = sum(len(rows) for split, rows in content.items() if split.startswith("oos_") and rows)
    return splits, names, _domains(path.parent / "domains.json", names), out_of_scope


def _domains(path: Path, names: list[str]) -> dict[str, list[str]]:
    """The intents of each domain: all of them, each once."""
    if not path.is_file():
        return {}
    domains = read_json(path)
    if not isinstance(domains, dict) or not all(isinstance(intents, list) for intents in domains.values()):
        raise ClplatformError(f"{path} is not a JSON object {{domain: [intents]}}")
    grouped = [c for intents in domains.values() for c in intents]
    wrong = [c for c in grouped if c not in names or grouped.count(c) > 1] + [c for c in names if c not in grouped]
    if wrong:
        raise ClplatformError(f"{path}: each intent of data_full.json is needed in one domain (wrong: {wrong[0]!r})")
    return domains


def banking77_files(data_dir: str | None) -> tuple[Texts, Texts, list[str]]:
    """Training and test texts and the intents in alphabetical order."""
    folder = data_folder("banking77", data_dir)
    if folder is None:
        raise missing("banking77", "train.csv and test.csv (columns text, category)")
    train, test = (read_files(str(folder / f"{split}.csv"), ["text"], "category", None) for split in ("train", "test"))
    return train, test, sorted(set(train.labels))


def hwu64_files(data_dir: str | None) -> tuple[Texts, Texts | None, Texts, list[str]]:
    """Training, validation (if there is a file) and test texts, and the intents in alphabetical order."""
    folder = data_folder("hwu64", data_dir)
    if folder is None:
        raise missing("hwu64", "train.csv, val.csv and test.csv (columns text, category)")
    validation = [folder / name for name in ("val.csv", "valid.csv") if (folder / name).is_file()]
    files = [folder / "train.csv", *validation[:1], folder / "test.csv"]
    train, *between, test = (read_files(str(file), ["text"], "category", None) for file in files)
    return train, between[0] if between else None, test, sorted(set(train.labels))


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ClplatformError: it is something else; with the line.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ClplatformError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
