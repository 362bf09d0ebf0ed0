"""Reading labelled text, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplatform.stream.image_files import data_folder, missing
from clplatform.types import ClplatformError


@dataclass
class Texts:
    """Labelled texts of one file.

    Args:
        texts: a text, or a pair, for each sample.
        experiences: names of the experiences they belong to, if a column says so.
        lines: of the samples in the file; None: one after another from the first.
    """

    path: str
    texts: list[Any]
    labels: list[str]
    experiences: list[str] | None = None
    lines: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for i, text in enumerate(self.texts):
            for part in (text,) if isinstance(text, str) else text:
                if not isinstance(part, str) or not part.strip():
                    raise ClplatformError(f"{self.where(i)}: the text is empty")
        if not self.texts:
            raise ClplatformError(f"{self.path} holds no sample")

    def where(self, i: int) -> str:
        return f"{self.path}:{self.lines[i] if self.lines else i + 1}"

    def joined(self, i: int) -> str:
        text = self.texts[i]
        return text if isinstance(text, str) else " ".join(text)


def clinc150_files(data_dir: str | None) -> tuple[Texts, Texts, Texts, list[str], dict[str, list[str]]]:
    """Training, validation and test texts, the intents (grouped by domain if `domains.json` is there), the domains.

    Raises:
        ClplatformError: `data_full.json` is missing or malformed.
    """
    folder = data_folder("clinc150", data_dir)
    path = folder / "data_full.json" if folder else None
    if path is None or not path.is_file():
        raise missing("clinc150", "data_full.json (and domains.json)")
    content = read_json(path)
    lacking = [split for split in ("train", "val", "test") if split not in content]
    if lacking:
        raise ClplatformError(f"{path} lacks {lacking}: it is not CLINC150's data_full.json")
    parts = []
    for split in ("train", "val", "test"):
        rows = content[split]
        if not all(isinstance(r, list) and len(r) == 2 for r in rows):
            raise ClplatformError(f"{path}:{split}: not all entries are a pair [text, intent]")
        parts.append(Texts(f"{path}:{split}", [r[0] for r in rows], [r[1] for r in rows]))
    known = set(parts[0].labels)
    domains_path = path.parent / "domains.json"
    domains: dict[str, list[str]] = read_json(domains_path) if domains_path.is_file() else {}
    names = [c for intents in domains.values() for c in intents] if domains else list(dict.fromkeys(parts[0].labels))
    if set(names) != known:
        raise ClplatformError(f"{domains_path} and {path} name different intents: {sorted(set(names) ^ known)[:3]} …")
    return parts[0], parts[1], parts[2], names, domains


def banking77_files(data_dir: str | None) -> tuple[Texts, Texts, list[str]]:
    """Training and test texts and the intents in alphabetical order."""
    folder = data_folder("banking77", data_dir)
    if folder is None:
        raise missing("banking77", "train.csv and test.csv (columns text, category)")
    train, test = (read_files(str(folder / f"{split}.csv"), ["text"], "category", None) for split in ("train", "test"))
    return train, test, sorted(set(train.labels))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ClplatformError(f"{path} is not JSON ({error})") from None


def read_files(path: str, text_columns: Sequence[str], label_column: str, experience_column: str | None) -> Texts:
    """A CSV, TSV, JSONL or Parquet file.

    Raises:
        ClplatformError: the file is missing, is not UTF-8, lacks a column, or has an empty cell; with the line.
    """
    import pandas as pd

    file = Path(path).expanduser()
    if not file.is_file():
        raise ClplatformError(f"there is no file {path}")
    suffix = file.suffix.lower()
    if suffix != ".parquet":
        _check_encoding(file)
    try:
        if suffix == ".parquet":
            table = pd.read_parquet(file).reset_index(drop=True)
        elif suffix in (".jsonl", ".ndjson"):
            lines = _lines(file)
            table = pd.DataFrame([_json_line(file, i, line) for i, line in lines.items()], index=list(lines))
        elif suffix in (".csv", ".tsv"):
            table = pd.read_csv(file, sep="\t" if suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
        else:
            raise ClplatformError(f"{path}: files end in .csv, .tsv, .jsonl or .parquet, not {suffix or 'nothing'}")
    except (ValueError, OSError) as error:  # pandas' ParserError and EmptyDataError, pyarrow's errors
        raise ClplatformError(f"{path}: {str(error).strip()}") from None
    if suffix in (".csv", ".tsv"):
        if not isinstance(table.index, pd.RangeIndex):
            raise ClplatformError(
                f"{path}: the rows have more cells than the header; quote texts that hold a separator"
            )
        if len(table):  # a quoted text may go over several lines
            more = table.apply(lambda column: column.str.count("\n")).sum(axis=1).astype(int)
            table.index = table.index + 2 + more.cumsum() - more
    return from_table(table, path, text_columns, label_column, experience_column)


def from_table(
    table: Any,
    path: str,
    text_columns: Sequence[str],
    label_column: str,
    experience_column: str | None,
) -> Texts:
    """Texts and labels of a table's rows. Its index are the rows' lines, or counts from 0."""
    import pandas as pd

    if isinstance(table.index, pd.RangeIndex):
        table.index = table.index + 1
    if not len(table):
        raise ClplatformError(f"{path} holds no sample")
    if len(text_columns) not in (1, 2):
        raise ClplatformError(f"stream.text_column={list(text_columns)}: name one column, or two for pairs of texts")
    needed = [*text_columns, label_column, *([experience_column] if experience_column else [])]
    for column in needed:
        if column not in table:
            there = ", ".join(map(str, table.columns))
            raise ClplatformError(f"{path}: there is no column {column!r} (there is: {there})")
        empty = table[column].isna() | (table[column].astype(str).str.strip() == "")
        if empty.any():
            raise ClplatformError(f"{path}:{table.index[empty.to_numpy().argmax()]}: the column {column!r} is empty")
    columns = [table[c].astype(str).tolist() for c in text_columns]
    texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    experiences = table[experience_column].astype(str).tolist() if experience_column else None
    return Texts(path, texts, table[label_column].astype(str).tolist(), experiences, table.index.tolist())


def hub_texts(
    dataset: str, subset: str | None, splits: Sequence[str], text_columns: Sequence[str], label_column: str,
    experience_column: str | None,
) -> list[Texts]:  # fmt: skip
    """Splits of a data set of Hugging Face `datasets`; labels of a class feature by their names."""
    import datasets  # takes a second

    saved = (Path(dataset) / "dataset_dict.json").is_file()
    try:
        loaded: Any = datasets.load_from_disk(dataset) if saved else datasets.load_dataset(dataset, subset)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ClplatformError(
            f"stream.dataset={dataset}: cannot be loaded ({type(error).__name__}: {reason}); give a name on the hub, a "
            "folder of CSV, JSONL or Parquet files named after their splits, or one written by save_to_disk"
        ) from error
    parts = []
    for split in splits:
        if split not in loaded:
            raise ClplatformError(
                f"stream.dataset={dataset}: there is no split {split!r} (there is: {', '.join(loaded)})"
            )
        table = loaded[split].to_pandas()
        feature = loaded[split].features.get(label_column)
        if hasattr(feature, "int2str"):
            unlabelled = ~table[label_column].between(0, feature.num_classes - 1)
            if unlabelled.any():
                raise ClplatformError(
                    f"stream.dataset={dataset}: the split {split!r} has rows without a label; name a labelled split"
                )
            table[label_column] = feature.int2str(table[label_column].tolist())
        parts.append(from_table(table, f"{dataset}:{split}", text_columns, label_column, experience_column))
    return parts


def _check_encoding(file: Path) -> None:
    content = file.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ClplatformError(
            f"{file}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); convert the file"
        ) from None


def _lines(file: Path) -> dict[int, str]:
    """Lines that are not blank, by number. Other separators than the newline may stand within JSON strings."""
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return {i: line for i, line in enumerate(lines, start=1) if line.strip()}


def _json_line(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ClplatformError(f"{file}:{number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ClplatformError(f"{file}:{number}: not a JSON object")
    return value
