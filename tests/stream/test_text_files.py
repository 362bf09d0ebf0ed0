"""Labelled texts from files: what counts as a text and a label, CLINC150's and Banking77's published files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from clplatform.stream.text_files import Texts, banking77_files, clinc150_files, read_files, read_json
from clplatform.types import ClplatformError

REAL = Path(os.environ.get("CLPLATFORM_DATA", "nowhere")).resolve() / "clinc150"
real = pytest.mark.skipif(not REAL.is_dir(), reason="CLPLATFORM_DATA names no folder with clinc150")


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLPLATFORM_DATA", raising=False)


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        call(*arguments)
    return str(caught.value)


# --- tables of labelled texts


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_texts(suffix: str) -> None:
    frame = pd.DataFrame(
        {"a": ["hi, you", "NA", 'say "no"\nnow', "ünï"], "b": ["1", "2", "3", "4"], "y": [7, 1, 7, 1], "of": ["x", "x", "y", "z"]}
    )  # fmt: skip
    path = f"t{suffix}"
    {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".parquet": lambda: frame.to_parquet(path),
    }[suffix]()
    read = read_files(path, ["a"], "y", "of")
    assert read.texts == frame["a"].tolist()
    assert read.labels == ["7", "1", "7", "1"]
    assert read.experiences == ["x", "x", "y", "z"]
    lines = {".csv": [2, 3, 4, 6], ".tsv": [2, 3, 4, 6], ".jsonl": [1, 2, 3, 4], ".parquet": [1, 2, 3, 4]}[suffix]
    assert [read.where(i) for i in range(4)] == [f"{path}:{line}" for line in lines]
    assert [read.joined(i) for i in range(4)] == frame["a"].tolist()
    pairs = read_files(path, ["a", "b"], "y", None)
    assert pairs.texts == list(zip(frame["a"], frame["b"], strict=True))
    assert pairs.joined(0) == "hi, you 1" and pairs.experiences is None


def test_one_column_may_serve_twice() -> None:
    Path("t.csv").write_text("text,label\nhi,a\nho,b\n")
    read = read_files("t.csv", ["text"], "label", "label")
    assert read.experiences == read.labels == ["a", "b"]


def rows(*values: Any, column: str = "text") -> str:
    """A JSONL file in whose last row a column has this value."""
    good = {"text": "hi", "more": "you", "label": "a", "of": 1}
    lines = [good, good | {column: values[0]}] if values else [good]
    Path("t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "t.jsonl"


@pytest.mark.parametrize("column", ["text", "more", "label", "of"])
@pytest.mark.parametrize("value", [None, "", "  \n", float("nan")])
def test_an_empty_cell_is_refused(column: str, value: Any) -> None:
    path = rows(value, column=column)
    assert refusal(read_files, path, ["text", "more"], "label", "of") == f"t.jsonl:2: the column {column!r} is empty"


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [("text", 5, "5"), ("text", True, "True"), ("text", ["a", "b"], "['a', 'b']"), ("label", 0.5, "0.5"),
     ("label", ["a"], "['a']"), ("label", {"a": 1}, "{'a': 1}"), ("of", [1], "[1]")],
)  # fmt: skip
def test_what_is_no_text_is_refused(column: str, value: Any, shown: str) -> None:
    """Several labels, for instance, would otherwise become a class of their own."""
    message = f"t.jsonl:2: the column {column!r} is {shown}, not a text"
    assert refusal(read_files, rows(value, column=column), ["text"], "label", "of") == message


def test_labels_may_be_numbers_and_truths() -> None:
    assert read_files(rows(3, column="label"), ["text"], "label", "of").labels == ["a", "3"]
    assert read_files(rows(True, column="label"), ["text"], "label", "of").labels == ["a", "True"]


def test_half_a_character_is_refused() -> None:
    """JSON can write it; no tokenizer can read it."""
    assert refusal(read_files, rows("so \ud83d"), ["text"], "label", None) == (
        "t.jsonl:2: the column 'text' holds half a character ('\\ud83d')"
    )
    assert read_files(rows("so \U0001f600"), ["text"], "label", None).texts[1] == "so \U0001f600"


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_file_without_a_row(name: str) -> None:
    if name == "t.parquet":
        pd.DataFrame({"text": [], "label": []}).to_parquet(name)
    else:
        Path(name).write_text("text,label\n" if name == "t.csv" else "\n")
    assert refusal(read_files, name, ["text"], "label", None) == f"{name} holds no sample"


@pytest.mark.parametrize("columns", [[], ["a", "b", "c"]])
def test_one_text_or_two(columns: list[str]) -> None:
    message = f"stream.text_column={columns}: name one column, or two for pairs of texts"
    assert refusal(read_files, "nowhere.csv", columns, "label", None) == message


def test_texts_check_themselves() -> None:
    assert refusal(Texts, "f", ["a", " "], ["x", "y"]) == "f:2: the text is empty"
    assert refusal(Texts, "f", ["a", ("b", "")], ["x", "y"], None, [4, 9]) == "f:9: the text is empty"
    assert refusal(Texts, "f", ["a", "b"], ["x", ""]) == "f:2: the label is empty"
    assert refusal(Texts, "f", [], []) == "f holds no sample"


# --- CLINC150

SPLITS = {
    "train": [["transfer 5 dollars", "transfer"], ["set a timer", "timer"], ["what is my balance", "balance"]],
    "val": [["move money", "transfer"]],
    "test": [["timer please", "timer"], ["how rich am i", "balance"]],
    "oos_train": [["sing", "oos"]], "oos_val": [], "oos_test": [["dance", "oos"], ["jump", "oos"]],
}  # fmt: skip
DOMAINS = {"banking": ["balance", "transfer"], "utility": ["timer"]}


def clinc(folder: Path, splits: Any = None, domains: Any = DOMAINS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data_full.json").write_text(json.dumps(SPLITS if splits is None else splits))
    if domains is not None:
        (folder / "domains.json").write_text(json.dumps(domains))
    return str(folder)


def test_clinc150_s_files(tmp_path: Path) -> None:
    splits, names, domains, out_of_scope = clinc150_files(clinc(tmp_path / "data"))
    assert {name: [[t, y] for t, y in zip(s.texts, s.labels, strict=True)] for name, s in splits.items()} == {
        name: SPLITS[name] for name in ("train", "val", "test")
    }
    assert names == ["transfer", "timer", "balance"]
    assert domains == DOMAINS
    assert out_of_scope == 3
    assert splits["test"].where(1) == f"{tmp_path}/data/data_full.json:test:2"


def test_the_order_of_intents_does_not_depend_on_the_domains(tmp_path: Path) -> None:
    with_domains, without = clinc150_files(clinc(tmp_path / "a")), clinc150_files(clinc(tmp_path / "b", domains=None))
    assert with_domains[1] == without[1]
    assert without[2] == {}


def test_clinc150_is_found_like_any_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert refusal(clinc150_files, None) == (
        "the data set clinc150 is not here: put data_full.json (and domains.json) into a folder and give "
        "stream.data_dir=<folder>, or into $CLPLATFORM_DATA/clinc150"
    )
    clinc(tmp_path / "all" / "clinc150")
    monkeypatch.setenv("CLPLATFORM_DATA", str(tmp_path / "all"))
    assert clinc150_files(None)[1] == ["transfer", "timer", "balance"]
    (tmp_path / "empty").mkdir()
    assert refusal(clinc150_files, str(tmp_path / "empty")).startswith("the data set clinc150 is not here: put")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], " lacks 'train': it is not CLINC150's data_full.json"),
        ({**SPLITS, "val": None}, " lacks 'val': it is not CLINC150's data_full.json"),
        ({**SPLITS, "test": []}, ":test holds no sample"),
        ({**SPLITS, "test": [["a", "timer"], ["b"]]}, ":test:2: the entry is not a pair [text, intent]"),
        ({**SPLITS, "train": ["ab", "cd"]}, ":train:1: the entry is not a pair [text, intent]"),
        ({**SPLITS, "val": [["a", "timer"], [" ", "timer"]]}, ":val:2: the text is empty"),
        ({**SPLITS, "val": [["a", "timer"], [3, "timer"]]}, ":val:2: the text is 3, not a text"),
        ({**SPLITS, "val": [["a", 3]]}, ":val:1: the label is 3, not a text"),
        ({**SPLITS, "train": [["a", None]]}, ":train:1: the label is empty"),
    ],
)
def test_a_malformed_data_full(splits: Any, message: str, tmp_path: Path) -> None:
    folder = clinc(tmp_path / "data", splits)
    assert refusal(clinc150_files, folder) == f"{folder}/data_full.json{message}"


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"banking": ["balance"], "utility": ["timer"]},
         ": each intent of data_full.json is needed in one domain (wrong: 'transfer')"),
        ({**DOMAINS, "more": ["timer"]}, ": each intent of data_full.json is needed in one domain (wrong: 'timer')"),
        ({**DOMAINS, "more": ["sing"]}, ": each intent of data_full.json is needed in one domain (wrong: 'sing')"),
        ([["timer"]], " is not a JSON object {domain: [intents]}"),
        ({"banking": "balance"}, " is not a JSON object {domain: [intents]}"),
    ],
)  # fmt: skip
def test_malformed_domains(domains: Any, message: str, tmp_path: Path) -> None:
    folder = clinc(tmp_path / "data", domains=domains)
    assert refusal(clinc150_files, folder) == f"{folder}/domains.json{message}"


def test_json_that_is_none() -> None:
    path = Path("t.json")
    path.write_text('{"a": 1,\n "b": [1, 2,\n}\n')
    assert refusal(read_json, path).startswith("t.json:3: not JSON (")
    path.write_bytes('{"a": 1,\n "b": "café"}'.encode("latin-1"))
    assert refusal(read_json, path) == "t.json:2: not UTF-8 (byte 0xe9); save the file in that encoding"
    path.write_text('\ufeff{"a": "café"}', encoding="utf-8")
    assert read_json(path) == {"a": "café"}


@real
def test_clinc150_as_published() -> None:
    """Larson et al. 2019, table 1: 100, 20 and 30 queries of each of 150 intents, in 10 domains of 15."""
    splits, names, domains, out_of_scope = clinc150_files(str(REAL))
    assert len(names) == 150 and out_of_scope == 1200
    for split, n in (("train", 100), ("val", 20), ("test", 30)):
        assert splits[split].labels == [label for _, label in json.loads((REAL / "data_full.json").read_text())[split]]
        assert pd.Series(splits[split].labels).value_counts().to_dict() == dict.fromkeys(names, n)
    assert [len(intents) for intents in domains.values()] == [15] * 10


# --- Banking77


def test_banking77_s_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "all" / "banking77"
    folder.mkdir(parents=True)
    texts = ['My card, "the blue one",\nwas declined.', "Where is it?", "top up"]
    pd.DataFrame({"text": texts, "category": ["declined", "arrival", "top_up"]}).to_csv(
        folder / "train.csv", index=False
    )
    (folder / "test.csv").write_text("text,category\nwhere,arrival\n")
    monkeypatch.setenv("CLPLATFORM_DATA", str(tmp_path / "all"))
    train, test, names = banking77_files(None)
    assert train.texts == texts and train.labels == ["declined", "arrival", "top_up"]
    assert (test.texts, test.labels) == (["where"], ["arrival"])
    assert names == ["arrival", "declined", "top_up"]
    (folder / "test.csv").unlink()
    assert refusal(banking77_files, None) == f"there is no file {folder / 'test.csv'}"
    monkeypatch.delenv("CLPLATFORM_DATA")
    assert refusal(banking77_files, None).startswith("the data set banking77 is not here: put train.csv and test.csv")
