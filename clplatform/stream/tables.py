"""Reading tables from files (CSV, TSV, JSONL, Parquet): what is not as it should be is refused, with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplatform.types import ClplatformError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
NO_LIMIT = 2**31 - 1  # characters of a cell; csv's own limit of 131,072 would refuse long documents


@dataclass
class Table:
    """Some columns of a file.

    Args:
        path: of the file, for messages.
        columns: name → the value of every row.
        lines: of the rows in the file (in Parquet: their numbers, from 1).
    """

    path: str
    columns: dict[str, list[Any]]
    lines: Sequence[int]


def read_table(path: str, needed: Sequence[str]) -> Table:
    """The needed columns of a CSV, TSV, JSONL or Parquet file; CSV and TSV have a line with their names.

    Raises:
        ClplatformError: the file is missing, malformed or not UTF-8, or lacks a column; with the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ClplatformError(f"{path} is a folder, not a file" if file.is_dir() else f"there is no file {path}")
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, file, needed)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, read_text(file), needed)
    if suffix in (".csv", ".tsv"):
        with no_limit():
            return _csv(path, read_text(file), "\t" if suffix == ".tsv" else ",", needed)
    raise ClplatformError(f"{path}: files end in .csv, .tsv, .jsonl or .parquet, not {suffix or 'nothing'}")


def read_text(file: Path) -> str:
    """The whole file, its line ends as they are, without a byte order mark; compressed by gzip or not.

    Raises:
        ClplatformError: it is damaged, or not UTF-8; with the line.
    """
    content = unzipped(file)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ClplatformError(
            f"{file}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file in that encoding"
        ) from None


def unzipped(file: Path) -> bytes:
    """The bytes of a file, compressed by gzip or not."""
    content = file.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ClplatformError(f"{file} is damaged ({error}): get it again") from None


def require(where: str, needed: Sequence[str], there: Sequence[str]) -> None:
    """Refuse a table that lacks a needed column, or has two of that name."""
    for column in needed:
        if there.count(column) > 1:
            raise ClplatformError(f"{where}: {there.count(column)} columns are named {column!r}")
        if column not in there:
            raise ClplatformError(f"{where}: there is no column {column!r} (there is: {', '.join(map(repr, there))})")


def _csv(path: str, content: str, delimiter: str, needed: Sequence[str]) -> Table:
    records = _records(path, content, delimiter)
    first, header = next(records, (1, []))
    if not header:
        raise ClplatformError(f"{path} is empty: the names of the columns are needed in its first line")
    hint = "" if len(header) > 1 else "; .csv files have commas between the cells, .tsv files tabs"
    try:
        require(f"{path}:{first}", needed, header)
    except ClplatformError as error:
        raise ClplatformError(f"{error}{hint}") from None
    rows, lines = [], []
    for line, row in records:
        if len(row) > len(header):
            raise ClplatformError(
                f"{path}:{line}: the row has {len(row)} cells, the header {len(header)}; quote texts that hold a "
                "separator"
            )
        rows.append(row + [""] * (len(header) - len(row)))
        lines.append(line)
    return Table(path, {c: [row[header.index(c)] for row in rows] for c in needed}, lines)


def _records(path: str, content: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, with their first line: a quoted text may go over several."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in reader:
            if len(row) > 1 or (row and row[0].strip()):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ClplatformError(
            f"{path}:{line}: the row cannot be read ({error}); a cell that begins with a quote ends with one, and "
            "quotes within it are doubled"
        ) from None


@contextmanager
def no_limit() -> Iterator[None]:
    """Inside, csv reads cells of any length."""
    before = csv.field_size_limit(NO_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_lines(path: str, content: str, needed: Sequence[str]) -> Table:
    # Other separators than the newline may stand within JSON strings.
    rows = {i: line for i, line in enumerate(content.split("\n"), start=1) if line.strip()}
    values = []
    for number, line in rows.items():
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ClplatformError(f"{path}:{number}: not JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(value, dict):
            raise ClplatformError(f"{path}:{number}: not a JSON object, such as {{{needed[0]!r}: …}}")
        require(f"{path}:{number}", needed, list(value))
        values.append(value)
    return Table(path, {c: [value[c] for value in values] for c in needed}, list(rows))


def _parquet(path: str, file: Path, needed: Sequence[str]) -> Table:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            require(path, needed, parquet.schema_arrow.names)
            table = parquet.read(columns=list(dict.fromkeys(needed)))
    except (ArrowException, OSError) as error:
        raise ClplatformError(f"{path}: not a Parquet file that can be read ({str(error).strip()})") from None
    return Table(path, {c: table.column(c).to_pylist() for c in needed}, range(1, table.num_rows + 1))
