"""Text streams from published and from one's own files: which classes and texts each experience has."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import configuration
from datasets import ClassLabel, Dataset, DatasetDict

from clplatform.build import build_stream
from clplatform.stream.base import InMemoryStream
from clplatform.stream.text import banking77, clinc150, hf_text, hwu64, text_files
from clplatform.types import ClplatformError, Data

REAL = Path(os.environ.get("CLPLATFORM_DATA", "nowhere")).resolve() / "clinc150"
real = pytest.mark.skipif(not REAL.is_dir(), reason="CLPLATFORM_DATA names no folder with clinc150")
SCENARIOS = ["class_incremental", "task_incremental", "domain_incremental"]
SHARED: dict[str, Any] = {
    "scenario": "class_incremental", "n_experiences": None, "class_order": None, "seed": None, "max_length": 32,
    "tokenizer_vocab_size": 500,
}  # fmt: skip
COLUMNS: dict[str, Any] = {
    "text_column": "text", "label_column": "label", "experience_column": None, "validation_fraction": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLPLATFORM_DATA", raising=False)


def refusal(call: Any, **options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        call(**options)
    return str(caught.value)


def everything(data: Data | None) -> dict[str, Any]:
    assert data is not None
    return data.fetch(torch.arange(len(data)))


def said(stream: InMemoryStream, data: Data | None) -> list[str]:
    return [stream.tokenizer.decode(ids, skip_special_tokens=True) for ids in everything(data)["input_ids"]]


def classes_of(stream: InMemoryStream) -> list[list[str]]:
    """The names of each experience's classes, in the order of their numbers."""
    return [[stream.info.class_names[k] for k in e.classes] for e in stream]


# --- CLINC150 and Banking77

DOMAINS = {"banking": ["pay", "balance"], "travel": ["flight", "hotel"], "home": ["timer", "lights"]}
INTENTS = ["timer", "pay", "hotel", "balance", "lights", "flight"]  # in the order of the training texts


def clinc(folder: Path, domains: Any = DOMAINS) -> str:
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"oos_train": [["sing", "oos"]]}
    for split, n in (("train", 4), ("val", 1), ("test", 2)):
        content[split] = [[f"{intent} {i} for {split}", intent] for i in range(n) for intent in INTENTS]
    (folder / "data_full.json").write_text(json.dumps(content))
    if domains:
        (folder / "domains.json").write_text(json.dumps(domains))
    return str(folder)


def make_clinc(folder: str, **options: Any) -> InMemoryStream:
    return clinc150(**{"name": "clinc150", "by": "intent", "data_dir": folder, **SHARED, **options})


def test_clinc150_by_intent(tmp_path: Path) -> None:
    stream = make_clinc(clinc(tmp_path / "data"), n_experiences=3)
    assert classes_of(stream) == [["timer", "pay"], ["hotel", "balance"], ["lights", "flight"]]
    assert [[len(d) for d in (e.train, e.validation, e.test)] for e in stream] == [[8, 2, 4]] * 3  # type: ignore[arg-type]
    assert stream.notes[0] == "1 out-of-scope queries of data_full.json are left out"
    for e in stream:
        for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
            texts = [text.replace(" ", "") for text in said(stream, getattr(e, split))]
            labels = everything(getattr(e, split))["labels"].tolist()
            assert all(t.startswith(stream.info.class_names[k]) for t, k in zip(texts, labels, strict=True))
            assert all(t.endswith(f"for{name}") for t in texts)


def test_without_domains_the_intents_are_the_same(tmp_path: Path) -> None:
    a, b = (
        make_clinc(clinc(tmp_path / "a"), n_experiences=3, seed=4),
        make_clinc(clinc(tmp_path / "b", None), n_experiences=3, seed=4),
    )
    assert a.info.class_names == b.info.class_names
    assert (
        refusal(make_clinc, folder=str(tmp_path / "b"), by="domain")
        == "stream.by=domain needs domains.json beside data_full.json"
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_clinc150_by_domain(scenario: str, tmp_path: Path) -> None:
    stream = make_clinc(clinc(tmp_path / "data"), by="domain", scenario=scenario)
    assert [e.name for e in stream] == list(DOMAINS)
    if scenario == "domain_incremental":
        assert stream.info.class_names == ("pay / flight / timer", "balance / hotel / lights")
        assert all(e.classes == (0, 1) for e in stream)
    else:
        assert classes_of(stream) == list(DOMAINS.values())
    for e in stream:
        intents = {text.replace(" ", "").partition("for")[0][:-1] for text in said(stream, e.test)}
        assert intents == set(DOMAINS[e.name])
        assert set(everything(e.test)["task_labels"].tolist()) == {e.index if scenario == "task_incremental" else 0}


def test_a_seed_shuffles_the_domains(tmp_path: Path) -> None:
    folder = clinc(tmp_path / "data")
    orders = {tuple(e.name for e in make_clinc(folder, by="domain", seed=seed)) for seed in range(8)}
    assert len(orders) > 2 and all(sorted(order) == sorted(DOMAINS) for order in orders)
    assert [e.name for e in make_clinc(folder, by="domain", seed=5)] == [
        e.name for e in make_clinc(folder, by="domain", seed=5)
    ]


def test_numbers_that_do_not_fit_the_domains(tmp_path: Path) -> None:
    folder = clinc(tmp_path / "data")
    for options in ({"n_experiences": 2}, {"class_order": [0, 1, 2]}):
        assert refusal(make_clinc, folder=folder, by="domain", **options).startswith(
            "stream.by=domain has one experience for each of the 3 domains: leave stream.n_experiences and"
        )
    assert len(make_clinc(folder, by="domain", n_experiences=3)) == 3
    assert "6 classes of clinc150 cannot be dealt evenly" in refusal(make_clinc, folder=folder, n_experiences=4)
    uneven = clinc(tmp_path / "uneven", {"a": INTENTS[:4], "b": INTENTS[4:]})
    assert "as many classes in every experience; they have [4, 2]" in refusal(
        make_clinc, folder=uneven, by="domain", scenario="domain_incremental"
    )


@pytest.mark.parametrize("validation", ["val.csv", "valid.csv", None])
def test_hwu64(validation: str | None, tmp_path: Path) -> None:
    """By intent or by domain, which is what an intent's name begins with; validation texts where there is a file."""
    intents = ["alarm_set", "play_music", "alarm_query", "play_radio", "qa_maths", "qa_stock"]
    for name, n in {"train.csv": 10, "test.csv": 2, **({validation: 3} if validation else {})}.items():
        write(tmp_path / name, [[f"{c} {name} {i}", c] for i in range(n) for c in intents], ["text", "category"])
    options = SHARED | {"name": "hwu64", "data_dir": str(tmp_path), "validation_fraction": 0.2, "by": "domain"}
    stream = hwu64(**options)
    assert [e.name for e in stream] == ["alarm", "play", "qa"]
    assert stream.info.class_names == tuple(sorted(intents))
    assert [[len(getattr(e, s)) for s in ("train", "validation", "test")] for e in stream] == (
        [[20, 6, 4]] * 3 if validation else [[16, 4, 4]] * 3
    )
    by_intent = options | {"by": "intent"}
    assert [len(e.classes) for e in hwu64(**by_intent | {"n_experiences": 2})] == [3, 3]
    assert refusal(hwu64, **by_intent).startswith("stream.n_experiences=8: the 6 classes of hwu64 cannot be dealt")


def test_banking77(tmp_path: Path) -> None:
    intents = [f"intent_{i}" for i in range(6)]
    for split, n in (("train", 10), ("test", 2)):
        write(
            tmp_path / f"{split}.csv",
            [[f"{c} text {i}", c] for i in range(n) for c in reversed(intents)],
            ["text", "category"],
        )
    options = SHARED | {"name": "banking77", "n_experiences": 3, "data_dir": str(tmp_path), "validation_fraction": 0.2}
    stream = banking77(**options)
    assert classes_of(stream) == [intents[:2], intents[2:4], intents[4:]]  # in alphabetical order
    assert [[len(d) for d in (e.train, e.validation, e.test)] for e in stream] == [[16, 4, 4]] * 3  # type: ignore[arg-type]
    write(tmp_path / "test.csv", [["a", "intent_1"], ["b", "intent_9"]], ["text", "category"])
    assert (
        refusal(banking77, **options) == f"{tmp_path}/test.csv:3: the label 'intent_9' is not among the training labels"
    )


@real
@pytest.mark.parametrize("by", ["intent", "domain"])
def test_the_real_clinc150(by: Any) -> None:
    stream = make_clinc(str(REAL), by=by, seed=1, max_length=24, tokenizer_vocab_size=4000)
    content, domains = (json.loads((REAL / f"{name}.json").read_text()) for name in ("data_full", "domains"))
    n = 15 if by == "intent" else 10
    assert len(stream) == n and all(len(e.classes) == 150 // n for e in stream)
    rows = content["train"] + content["val"] + content["test"]
    used = []
    for e in stream:
        for part, per_class in ((e.train, 100), (e.validation, 20), (e.test, 30)):
            batch = everything(part)
            assert batch["labels"].bincount(minlength=150)[list(e.classes)].tolist() == [per_class] * len(e.classes)
            assert [rows[i][1] for i in batch["index"]] == [stream.info.class_names[k] for k in batch["labels"]]
            used += batch["index"].tolist()
        if by == "domain":
            assert {stream.info.class_names[k] for k in e.classes} == set(domains[e.name])
    assert sorted(used) == list(range(22_500))
    assert "1200 out-of-scope queries of data_full.json are left out" in stream.notes
    # The published splits themselves share a few queries.
    assert "texts that are in the train and in the test split: 2" in stream.notes
    assert "texts that are in the train and in the validation split: 3" in stream.notes
    assert any(note.endswith("train texts are cut to stream.max_length=24 tokens") for note in stream.notes)
    trained_on = set(" ".join(rows[i][0] for i in everything(stream[0].train)["index"]).split())
    others = {word for i in everything(stream[5].train)["index"] for word in rows[i][0].split()} - trained_on
    vocabulary = set(stream.tokenizer.get_vocab())
    longer = {word for word in others if word.isascii() and word.isalpha() and not any(word in w for w in trained_on)}
    assert len(longer) > 100 and not longer & vocabulary


# --- own files


def write(path: Path | str, rows: Any, header: Any = ("text", "label")) -> str:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def three_files(labels: Any = ("a", "b", "c", "d")) -> dict[str, Any]:
    """Ten, two and three texts of every label."""
    return {
        split: write(f"{split}.csv", [[f"{c} {split} {i}", c] for i in range(n) for c in labels])
        for split, n in (("train", 10), ("validation", 2), ("test", 3))
    }


def own(**options: Any) -> InMemoryStream:
    return text_files(**{"name": "own", "validation": None, **SHARED, **COLUMNS, **options})


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_classes_are_dealt_in_the_order_of_the_training_texts(scenario: str) -> None:
    stream = own(**three_files(["d", "a", "c", "b"]), n_experiences=2, scenario=scenario)
    if scenario == "domain_incremental":
        assert stream.info.class_names == ("d / c", "a / b")
    else:
        assert classes_of(stream) == [["d", "a"], ["c", "b"]]
    assert [e.task_label for e in stream] == ([0, 1] if scenario == "task_incremental" else [0, 0])
    assert [[len(d) for d in (e.train, e.validation, e.test)] for e in stream] == [[20, 4, 6]] * 2  # type: ignore[arg-type]


def test_validation_is_taken_off_the_training_texts_where_no_file_has_it() -> None:
    files = three_files() | {"validation": None}
    stream = own(**files, n_experiences=2, validation_fraction=0.3)
    for e in stream:
        assert e.validation is not None
        assert e.validation.labels.bincount(minlength=4)[list(e.classes)].tolist() == [3, 3]
        assert not set(said(stream, e.train)) & set(said(stream, e.validation))
        assert len(e.train) == 14
    assert all(e.validation is None for e in own(**files, n_experiences=2))


def test_texts_are_held_out_for_the_test_where_no_file_has_it() -> None:
    files = three_files() | {"validation": None}
    whole = own(**files, n_experiences=2)
    stream = own(**files | {"test": None}, n_experiences=2, test_fraction=0.3, validation_fraction=0.2)
    for e, there in zip(stream, whole, strict=True):
        parts = [said(stream, d) for d in (e.train, e.validation, e.test)]
        assert [len(p) for p in parts] == [12, 2, 6]
        assert sorted(t for part in parts for t in part) == sorted(said(whole, there.train))
        assert e.test.labels.bincount(minlength=4)[list(e.classes)].tolist() == [3, 3]
    other = own(**files | {"test": None}, n_experiences=2, test_fraction=0.3, seed=1, class_order=[0, 1, 2, 3])
    assert {*said(other, other[0].test)} != {*said(stream, stream[0].test)}
    for options, reason in (
        ({"test": None}, "stream.test is missing: give a file, or stream.test_fraction=0.2"),
        ({"test_fraction": 0.2}, "stream.test_fraction holds samples out where there is no stream.test"),
    ):
        with pytest.raises(ClplatformError, match=reason):
            own(**files | options, n_experiences=2)
    rows = [[f"{e} {c} {i}", c, e] for i in range(4) for e in ("x", "y") for c in "ba"]
    write("train.csv", rows, ("text", "label", "month"))
    named = own(
        **files | {"test": None},
        n_experiences=None,
        experience_column="month",
        test_fraction=0.5,
        scenario="class_incremental",
    )
    assert [e.name for e in named] == ["x", "y"] and named.info.class_names == ("b", "a")
    for e in named:
        assert e.train.labels.bincount().tolist() == e.test.labels.bincount().tolist() == [2, 2]


def test_an_order_of_one_s_own_beats_the_seed() -> None:
    stream = own(**three_files(), n_experiences=2, class_order=[3, 0, 2, 1], seed=9)
    assert classes_of(stream) == [["d", "a"], ["c", "b"]]


def test_the_order_of_classes_has_its_own_seed_apart_from_training_s() -> None:
    three_files(list("abcdefgh"))

    def built(*overrides: str) -> Any:
        config = configuration(
            "stream=text_files", "stream.train=train.csv", "stream.test=test.csv", "stream.n_experiences=4",
            "backbone=bert_tiny", *overrides,
        )  # fmt: skip
        torch.manual_seed(config["seed"])
        stream = build_stream(config)
        held_out = [e.validation.labels.tolist() for e in stream if e.validation is not None]
        ids = [everything(e.validation)["index"].tolist() for e in stream]
        return stream.info.class_names, held_out, ids

    assert built("seed=0", "stream.seed=1") == built("seed=5", "stream.seed=1")
    assert built("seed=0", "stream.seed=1")[0] != built("seed=0", "stream.seed=2")[0]
    assert built("seed=0", "stream.seed=1")[2] != built("seed=0", "stream.seed=2")[2]
    assert built("seed=3")[0] == tuple("abcdefgh")


def test_pairs_of_texts() -> None:
    for split in ("train", "test"):
        rows = [[f"why {i}", f"since {i} {split}", "x" if i % 2 else "y"] for i in range(6)]
        write(f"{split}.csv", rows, ["question", "answer", "label"])
    stream = own(train="train.csv", test="test.csv", text_column=["answer", "question"], n_experiences=2)
    tokens = stream.tokenizer.convert_ids_to_tokens(everything(stream[0].train)["input_ids"][0])
    assert tokens[0] == "[CLS]" and tokens.count("[SEP]") == 2
    assert [text.replace(" ", "") for text in said(stream, stream[0].train)] == [
        f"since{i}trainwhy{i}" for i in (0, 2, 4)
    ]
    assert {"since", "why"} <= set(stream.tokenizer.get_vocab())


def test_how_many_experiences_must_be_said() -> None:
    files = three_files()
    assert refusal(own, **files) == "stream.n_experiences is missing: say how many, or name a stream.experience_column"
    assert "the 4 classes of own cannot be dealt evenly" in refusal(own, **files, n_experiences=3)


def test_labels_and_files_that_do_not_fit() -> None:
    files = three_files() | {"test": write("other.csv", [["x", "a"], ["y", "e"]])}
    message = "other.csv:3: the label 'e' is not among the training labels"
    assert refusal(own, **files, n_experiences=2) == message
    same = files | {"test": "./train.csv"}
    assert refusal(own, **same, n_experiences=2) == "./train.csv is both the train and the test split: give two"
    assert refusal(own, **files | {"train": "gone.csv"}, n_experiences=2) == "there is no file gone.csv"


# --- experiences by a column


def places(**changes: Any) -> dict[str, str]:
    """Training, validation and test rows (text, label, place), with which rows are changed."""
    rows = {
        split: [[f"{c} {of} {split} {i}", c, of] for of, labels in (("inn", "ab"), ("sea", "cd")) for c in labels for i in range(n)]
        for split, n in (("train", 4), ("validation", 1), ("test", 2))
    } | changes  # fmt: skip
    return {split: write(f"{split}.csv", some, ["text", "label", "place"]) for split, some in rows.items()}


def test_a_column_names_the_experiences() -> None:
    stream = own(**places(), experience_column="place")
    assert [e.name for e in stream] == ["inn", "sea"]
    assert classes_of(stream) == [["a", "b"], ["c", "d"]]
    for e in stream:
        for split, n in (("train", 8), ("validation", 2), ("test", 4)):
            texts = said(stream, getattr(e, split))
            assert len(texts) == n and all(e.name in text.replace(" ", "") for text in texts)
    assert [e.name for e in own(**places(), experience_column="place", n_experiences=2)] == ["inn", "sea"]


def test_a_seed_shuffles_the_experiences_of_a_column() -> None:
    rows = [[f"{p} text {i}", p, p] for p in "efghi" for i in range(2)]
    files = {
        s: write(f"{s}.csv", [[f"{s} {t}", *rest] for t, *rest in rows], ["text", "label", "place"])
        for s in ("train", "test")
    }
    orders = {"".join(e.name for e in own(**files, experience_column="place", seed=s)) for s in range(4)}
    assert len(orders) > 1 and all(sorted(order) == list("efghi") for order in orders)
    shuffled = own(**files, experience_column="place", seed=1)
    assert shuffled.info.class_names == tuple(e.name for e in shuffled)


def test_places_that_share_labels_mean_the_same_by_them() -> None:
    """Sentiment of several products, say: a label is a class in all of them, and may be new in a later one."""
    rows = [
        [f"{c} {of} {i}", c, of] for of, labels in (("inn", "ba"), ("sea", "abc")) for c in labels for i in range(3)
    ]
    files = {
        s: write(f"{s}.csv", [[f"{s} {t}", *rest] for t, *rest in rows], ["text", "label", "place"])
        for s in ("train", "test")
    }
    for scenario in SCENARIOS:
        stream = own(**files, experience_column="place", scenario=scenario)
        assert stream.info.class_names == ("b", "a", "c")
        assert [e.classes for e in stream] == [(0, 1), (0, 1, 2)]
        assert [e.n_seen_classes for e in stream] == [2, 3]
        for e in stream:
            texts = [text.replace(" ", "").removeprefix("train") for text in said(stream, e.train)]
            letters = [text[0] for text in texts]
            assert all(e.name in text for text in texts)
            assert ["bac"[k] for k in everything(e.train)["labels"]] == letters


def test_places_with_labels_of_their_own_number_them_by_place() -> None:
    stream = own(**places(), experience_column="place", scenario="domain_incremental")
    assert stream.info.class_names == ("a / c", "b / d")
    assert [e.classes for e in stream] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_place_or_a_label_in_it_that_is_never_trained_on(split: str) -> None:
    good = ["a inn x", "a", "inn"]
    files = places(**{split: [good, ["new", "a", "zoo"]]})
    message = f"{split}.csv:3: the experience 'zoo' has no training texts"
    assert refusal(own, **files, experience_column="place") == message
    files = places(**{split: [good, good, ["c", "c", "inn"]]})
    message = f"{split}.csv:4: the label 'c' is not trained in the experience 'inn'"
    assert refusal(own, **files, experience_column="place") == message


def test_a_place_without_validation_or_test_texts_is_noted() -> None:
    stream = own(**places(validation=[["x", "c", "sea"]], test=[["y", "a", "inn"]]), experience_column="place")
    assert "no validation texts in the experiences 1: they are not validated" in stream.notes
    assert "no test texts in the experiences 2: they have no accuracy" in stream.notes
    assert stream[0].validation is None and len(stream[1].test) == 0


def test_numbers_beside_a_column_are_refused() -> None:
    for options in ({"n_experiences": 3}, {"class_order": [0, 1, 2, 3]}):
        assert refusal(own, **places(), experience_column="place", **options) == (
            "stream.experience_column names the 2 experiences and their classes: leave stream.n_experiences and "
            "stream.class_order null"
        )
    assert "no column 'town' (there is: 'text', 'label', 'place')" in refusal(own, **places(), experience_column="town")


# --- Hugging Face


@pytest.mark.parametrize("kind", ["saved", "folder"])
def test_hugging_face_data_gives_the_stream_that_files_give(kind: str) -> None:
    files = three_files()
    if kind == "saved":
        parts = {}
        for split, path in files.items():
            with Path(path).open() as file:
                rows = list(csv.DictReader(file))
            parts[split] = Dataset.from_list(rows).cast_column("label", ClassLabel(names=list("dcba")))
        DatasetDict(parts).save_to_disk("saved")
    options = SHARED | COLUMNS | {"n_experiences": 2, "seed": 3}
    stream = hf_text(
        name="own", dataset="saved" if kind == "saved" else ".", subset=None, train_split="train", validation_split="validation",
        test_split="test", **options,
    )  # fmt: skip
    same = own(**files, n_experiences=2, seed=3)
    assert stream.info == same.info and stream.notes == same.notes
    for a, b in zip(stream, same, strict=True):
        assert a.info == b.info
        for split in ("train", "validation", "test"):
            x, y = everything(getattr(a, split)), everything(getattr(b, split))
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_one_split_cannot_be_two() -> None:
    three_files()
    options = SHARED | COLUMNS | {"name": "own", "dataset": ".", "subset": None, "n_experiences": 2}
    message = refusal(hf_text, **options, train_split="train", validation_split=None, test_split="train")
    assert message == "train.csv is both the train and the test split: give two"
    stream = hf_text(
        **options | {"validation_fraction": 0.5}, train_split="train", validation_split=None, test_split="test"
    )
    assert [len(e.validation) for e in stream] == [10, 10]  # type: ignore[arg-type]
