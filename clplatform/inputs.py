"""Samples to classify, from files and standard input: texts from lines and tables, images from files and arrays."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from clplatform.stream.tables import read_text
from clplatform.types import ClplatformError

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
NO_LINES = {".json", ".parquet", ".npy", ".xlsx", ".xls", *IMAGES}  # files that are not one text a line


def read_texts(paths: Iterable[str], columns: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Texts of all files, in order; twice: as names and as inputs. Blank lines are skipped; it is said how many.

    Args:
        paths: files; `-`: lines from standard input.
        columns: of tables: the text's, or the two of a pair of texts.

    Raises:
        ClplatformError: a file, a column or a text is missing, or the file is something else.
    """
    blank: list[str] = []
    texts = [text for path in paths for text in _texts(path, columns, blank)]
    if not texts:
        raise ClplatformError("there is no text to classify in the input")
    if blank:
        print(f"clplatform: blank lines that are skipped: {len(blank)} (the first is {blank[0]})", file=sys.stderr)
    return texts, texts


def _texts(path: str, columns: Sequence[str], blank: list[str]) -> Iterator[Any]:
    content, suffix = _read(path), _suffix(path)
    if suffix in (".csv", ".tsv"):
        rows = _table(path, content, "\t" if suffix == ".tsv" else ",", blank)
    elif suffix in (".jsonl", ".ndjson"):
        rows = ((i, _json(path, i, line)) for i, line in _lines(path, content, blank))
    else:
        where = "standard input" if path == "-" else path
        yield from (line for _, line in _lines(where, content, blank))
        return
    for number, row in rows:
        cells = [_cell(f"{path}:{number}", row, column) for column in columns]
        yield cells[0] if len(cells) == 1 else cells


def _cell(where: str, row: dict[str, Any], column: str) -> str:
    if column not in row:
        there = ", ".join(map(str, row))
        raise ClplatformError(f"{where}: there is no column {column!r} (there is: {there}); use --column")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ClplatformError(f"{where}: the column {column!r} has no text ({value!r})")
    return value


def _lines(path: str, content: str, blank: list[str]) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers; where others are is added to `blank`."""
    lines = content.removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line
        else:
            blank.append(f"{path}:{number}")


def _table(path: str, content: str, delimiter: str, blank: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the number of their last line; a quoted text may go over several."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                blank.append(f"{path}:{reader.line_num}")
            elif not header:
                header = cells
            elif len(cells) > len(header):
                raise ClplatformError(
                    f"{path}:{reader.line_num}: the row has more cells than the header; quote texts that hold a separator"
                )
            else:
                yield reader.line_num, dict(zip_longest(header, cells))
    except csv.Error as error:
        raise ClplatformError(f"{path}:{reader.line_num}: {error}") from None


def _json(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ClplatformError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ClplatformError(f"{path}:{number}: not a JSON object")
    return value


def _suffix(path: str) -> str:
    """That of a file, compressed or not."""
    return Path(path.lower().removesuffix(".gz")).suffix


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    if _suffix(path) in NO_LINES:
        raise ClplatformError(f"{path}: the model classifies text: give text lines (.txt), .csv, .tsv or .jsonl")
    try:
        return io.StringIO(read_text(Path(path)), newline=None).read()  # lines end with line feeds
    except FileNotFoundError:
        raise ClplatformError(f"there is no file {path}") from None
    except IsADirectoryError as error:
        raise ClplatformError(f"{path}: not a text file in UTF-8 ({error})") from None


def read_images(paths: Iterable[str]) -> tuple[list[str], Any]:
    """Names and inputs: one array file, or image files and folders of them.

    Raises:
        ClplatformError: there is no such file, or no image in it.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
        elif path.is_file():
            files.append(path)
        else:
            what = "nothing is given" if str(path) == "-" else f"there is no file {path}"
            raise ClplatformError(
                f"{what}; the model classifies images: give image files, a folder of them or an array (.npy)"
            )
    arrays = [f for f in files if f.suffix.lower() == ".npy"]
    if arrays and len(files) > 1:
        raise ClplatformError(f"{arrays[0]}: an array is classified alone; give it without other files")
    if arrays:
        return _array(arrays[0])
    if not files:
        raise ClplatformError("there is no image in the input")
    return [str(f) for f in files], files


def _array(path: Path) -> tuple[list[str], Any]:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ClplatformError(f"{path} is not an array that can be read ({error})") from None
    if array.ndim == 0 or array.dtype.kind not in "uif":
        raise ClplatformError(f"{path} holds {array.dtype} {list(array.shape)}; numbers [N, height, width] are needed")
    return [f"{path}[{i}]" for i in range(len(array))], array
