"""Hugging Face `datasets`: folders that `save_to_disk` wrote, folders of files, and names on a hub that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from clplatform.stream.text_hub import hub_texts
from clplatform.types import ClplatformError

NAMES = ["negative", "positive"]
SPLITS = {
    "train": {"text": ["bad", "good", "NA"], "more": ["a", "b", "c"], "label": [0, 1, 0], "of": [1, 0, 0]},
    "test": {"text": ["worse", "better"], "more": ["d", "e"], "label": [0, 1], "of": [0, 1]},
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def save(folder: str, splits: Any = SPLITS, **features: Any) -> str:
    parts = {}
    for name, columns in splits.items():
        part = datasets.Dataset.from_dict(columns)
        for column, feature in features.items():
            part = part.cast_column(column, feature)
        parts[name] = part
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def texts(dataset: str, *, subset: str | None = None, splits: Any = ("train", "test"), columns: Any = ("text",),
          label: str = "label", experience: str | None = None) -> list[Any]:  # fmt: skip
    return hub_texts(dataset, subset, list(splits), list(columns), label, experience)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        texts(*arguments, **options)
    return str(caught.value)


# --- save_to_disk


def test_a_saved_folder_with_classes_by_their_names() -> None:
    feature = datasets.ClassLabel(names=NAMES)
    save("saved", label=feature, of=datasets.ClassLabel(names=["kitchen", "books"]))
    train, test = texts("saved", columns=["text", "more"], experience="of")
    assert train.texts == [("bad", "a"), ("good", "b"), ("NA", "c")]
    assert train.labels == ["negative", "positive", "negative"]
    assert train.experiences == ["books", "kitchen", "kitchen"]
    assert test.labels == NAMES
    assert [train.where(i) for i in range(3)] == ["saved:train:1", "saved:train:2", "saved:train:3"]


def test_a_saved_folder_with_plain_labels() -> None:
    train, _ = texts(save("saved"))
    assert train.labels == ["0", "1", "0"] and train.experiences is None


def test_other_columns_are_not_looked_at() -> None:
    """A column that takes an optional package to decode, here one of images, is left alone."""
    splits = {name: columns | {"image": [{"bytes": b"no image", "path": None}] * len(columns["text"])}
              for name, columns in SPLITS.items()}  # fmt: skip
    train, _ = texts(save("saved", splits, image=datasets.Image()))
    assert train.texts == ["bad", "good", "NA"]


def test_rows_without_a_label_are_named() -> None:
    splits = SPLITS | {"test": SPLITS["test"] | {"label": [1, -1]}}
    save("saved", splits, label=datasets.ClassLabel(names=NAMES))
    assert refusal("saved") == "saved:test:2: the column 'label' is empty"
    save("none", SPLITS | {"test": SPLITS["test"] | {"label": [None, 1]}}, label=datasets.ClassLabel(names=NAMES))
    assert refusal("none") == "none:test:1: the column 'label' is empty"


def test_several_labels_are_no_label() -> None:
    splits = {name: columns | {"label": [[y] for y in columns["label"]]} for name, columns in SPLITS.items()}
    assert refusal(save("saved", splits)) == "saved:train:1: the column 'label' is [0], not a text"


def test_a_split_or_a_column_that_is_not_there() -> None:
    save("saved")
    assert refusal("saved", splits=["train", "validation"]) == (
        "stream.dataset=saved: there is no split 'validation' (there is: 'train', 'test')"
    )
    there = "(there is: 'text', 'more', 'label', 'of')"
    assert refusal("saved", label="intent") == f"saved:train: there is no column 'intent' {there}"
    assert refusal("saved", columns=["a", "b", "c"]).startswith("stream.text_column=['a', 'b', 'c']: name one")


def test_a_saved_folder_has_no_subsets() -> None:
    save("saved")
    message = "stream.subset=en: a folder that save_to_disk wrote has none; leave it null"
    assert refusal("saved", subset="en") == message


def test_a_single_split_saved_alone_is_explained() -> None:
    datasets.Dataset.from_dict(SPLITS["train"]).save_to_disk("alone")
    message = refusal("alone")
    assert message.startswith(
        "stream.dataset=alone: cannot be loaded (ValueError: You are trying to load a dataset that was"
    )
    assert message.endswith("or one that DatasetDict.save_to_disk wrote")


# --- folders of files


def files(folder: str, suffix: str, names: dict[str, str] | None = None) -> str:
    """The splits as files; labels have a leading zero, which a reader that guesses types would lose."""
    Path(folder).mkdir()
    for split, columns in SPLITS.items():
        rows = {"text": columns["text"], "label": [f"0{y}" for y in columns["label"]]}
        path = str(Path(folder) / ((names or {}).get(split, split) + suffix))
        part = datasets.Dataset.from_dict(rows)
        {".csv": part.to_csv, ".jsonl": part.to_json, ".parquet": part.to_parquet}[suffix](path)
    return folder


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_folder_with_a_file_for_each_split(suffix: str) -> None:
    train, test = texts(files("folder", suffix))
    assert train.texts == ["bad", "good", "NA"]
    assert train.labels == ["00", "01", "00"] and test.labels == ["00", "01"]
    assert train.path == f"folder/train{suffix}"


def test_a_folder_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files("folder", ".jsonl")
    save("saved")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("folder", "saved"):
        assert texts(f"~/{name}")[1].texts == ["worse", "better"]


def test_shards_and_other_names_are_found_by_datasets() -> None:
    shards = {"train": "train-00000-of-00001", "test": "test-00000-of-00001"}
    train, test = texts(files("folder", ".parquet", shards))
    assert train.texts == ["bad", "good", "NA"] and train.labels == ["00", "01", "00"] and test.labels == ["00", "01"]
    assert train.path == "folder:train"


def test_what_is_wrong_in_a_file_is_named() -> None:
    files("folder", ".csv")
    (Path("folder") / "test.csv").write_text("text,label\nx,01\ny,z,00\n")
    assert refusal("folder").startswith("folder/test.csv:3: the row has 3 cells, the header 2")


def test_what_datasets_hides_is_told() -> None:
    files("folder", ".jsonl", {"train": "train-1", "test": "test-1"})
    (Path("folder") / "train-1.jsonl").write_text(json.dumps({"text": "a", "label": "b"}) + '\n{"text": \n')
    message = refusal("folder")
    assert message.startswith("stream.dataset=folder: cannot be loaded (")
    assert "JSON" in message and "DatasetGenerationError" not in message


def test_an_empty_folder() -> None:
    Path("folder").mkdir()
    assert refusal("folder").startswith("stream.dataset=folder: cannot be loaded (EmptyDatasetError: ")


# --- the hub


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would otherwise retry for half a minute."""

    def wait(_: float) -> None:
        raise AssertionError("it tried again")

    monkeypatch.setattr("time.sleep", wait)
    monkeypatch.setattr("clplatform.stream.text_hub.reachable", lambda: False)
    before = constants.HF_HUB_OFFLINE
    message = refusal("somebody/reviews")
    assert message.startswith("stream.dataset=somebody/reviews: cannot be loaded (ConnectionError: Couldn't reach")
    assert "give a name on the hub, a folder of CSV, JSONL or Parquet files named after their splits" in message
    assert before == constants.HF_HUB_OFFLINE
