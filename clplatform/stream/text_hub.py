"""Labelled text from Hugging Face `datasets`: the hub, folders that `save_to_disk` wrote, folders of files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clplatform.backbone.pretrained import offline, reachable
from clplatform.stream.tables import SUFFIXES, Table, require
from clplatform.stream.text_files import Texts, needed_columns, read_files, texts_of
from clplatform.types import ClplatformError


def hub_texts(
    dataset: str, subset: str | None, splits: Sequence[str], text_columns: Sequence[str], label_column: str,
    experience_column: str | None,
) -> list[Texts]:  # fmt: skip
    """Splits of a data set of Hugging Face `datasets`; classes of a class feature by their names.

    A folder with one file for each split (`train.csv`, …) is read without `datasets`, which would guess the columns'
    types (a label 01 is the number 1 to it, a text "NA" none).
    """
    needed = needed_columns(text_columns, label_column, experience_column)
    files = [split_files(dataset, split) for split in splits]
    if subset is None and all(len(found) == 1 for found in files):
        return [read_files(str(found[0]), text_columns, label_column, experience_column) for found in files]
    loaded = load_dataset(dataset, subset)
    parts = []
    for split in splits:
        if split not in loaded:
            raise ClplatformError(
                f"stream.dataset={dataset}: there is no split {split!r} (there is: {', '.join(map(repr, loaded))})"
            )
        require(f"{dataset}:{split}", needed, loaded[split].column_names)
        rows = loaded[split].select_columns(list(dict.fromkeys(needed)))
        columns = {c: _class_names(rows.features[c], values) for c, values in rows[:].items()}
        table = Table(f"{dataset}:{split}", columns, range(1, len(rows) + 1))
        parts.append(texts_of(table, text_columns, label_column, experience_column))
    return parts


def split_files(dataset: str, split: str) -> list[Path]:
    """Files of a folder that are named after a split."""
    folder = Path(dataset).expanduser()
    return [f for f in folder.iterdir() if f.stem == split and f.suffix.lower() in SUFFIXES] if folder.is_dir() else []


def load_dataset(dataset: str, subset: str | None) -> Any:
    """All splits, from a folder or the hub (only from its cache when it does not answer)."""
    import datasets  # takes a second

    folder = Path(dataset).expanduser()
    saved, local = (folder / "dataset_dict.json").is_file(), folder.is_dir()
    if saved and subset is not None:
        raise ClplatformError(f"stream.subset={subset}: a folder that save_to_disk wrote has none; leave it null")
    try:
        if saved:
            return datasets.load_from_disk(str(folder))
        with contextlib.nullcontext() if local or reachable() else offline():
            return datasets.load_dataset(str(folder) if local else dataset, subset)
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` hides what it met in a file
        reason = str(cause).strip().partition("\n")[0]
        raise ClplatformError(
            f"stream.dataset={dataset}: cannot be loaded ({type(cause).__name__}: {reason}); give a name on the hub, a "
            "folder of CSV, JSONL or Parquet files named after their splits, or one that DatasetDict.save_to_disk wrote"
        ) from error


def _class_names(feature: Any, values: list[Any]) -> list[Any]:
    """Classes by their names; −1 is how `datasets` marks a missing one."""
    if not hasattr(feature, "int2str"):
        return values
    return [None if value is None or value < 0 else feature.int2str(value) for value in values]
