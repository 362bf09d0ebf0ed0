"""Samples to classify, from files and standard input: texts from lines and tables, images from files and arrays."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clplatform.types import ClplatformError

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
NO_LINES = {".json", ".parquet", ".npy", ".xlsx", ".xls", *IMAGES}  # files that are not one text a line


def read_texts(paths: Iterable[str], columns: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Texts of all files, in order; twice: as names and as inputs.

    Args:
        paths: files; `-`: lines from standard input.
        columns: of tables: the text's, or the two of a pair of texts.

    Raises:
        ClplatformError: a file, a column or a text is missing, or the file is something else.
    """
    texts = [text for path in paths for text in _texts(path, columns)]
    if not texts:
        raise ClplatformError("there is no text to classify in the input")
    return texts, texts


def _texts(path: str, columns: Sequence[str]) -> Iterator[Any]:
    content, suffix = _read(path), Path(path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        rows = _table(path, content, "\t" if suffix == ".tsv" else ",")
    elif suffix in (".jsonl", ".ndjson"):
        rows = ((i, _json(path, i, line)) for i, line in enumerate(content.split("\n"), start=1) if line.strip())
    else:
        yield from (line for line in content.split("\n") if line.strip())
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


def _table(path: str, content: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the number of their last line; a quoted text may go over several."""
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ClplatformError(
                    f"{path}:{reader.line_num}: the row has more cells than the header; quote texts that hold a separator"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ClplatformError(f"{path}:{reader.reader.line_num}: {error}") from None


def _json(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ClplatformError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ClplatformError(f"{path}:{number}: not a JSON object")
    return value


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    if Path(path).suffix.lower() in NO_LINES:
        raise ClplatformError(f"{path}: the model classifies text: give text lines (.txt), .csv, .tsv or .jsonl")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ClplatformError(f"there is no file {path}") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
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
