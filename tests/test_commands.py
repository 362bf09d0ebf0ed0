"""`clplatform predict`: every kind of input gives the model's own answers; what is wrong is said in one line."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import BERT, TOPICS, VIT, text_stream, trained
from PIL import Image

import clplatform
from clplatform.cli import main
from clplatform.inputs import IMAGES
from clplatform.stream.image_files import digits as load_digits

TEXTS = ["book a flight to paris", "what is my balance", "will it rain today", "play some jazz"]
Predict = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs: a text model, one of pairs of texts, an image model, one with task ids."""
    root = tmp_path_factory.mktemp("runs")
    text = [*text_stream(root / "data"), *BERT, "strategy=finetuning"]
    pairs = [*text_stream(root / "data", pairs=True), *BERT, "strategy=finetuning"]
    image = [*VIT, "strategy=finetuning", "stream.n_experiences=2"]
    tasks = [*image, "stream.scenario=task_incremental", "head=multi"]
    chosen = {"text": text, "pairs": pairs, "image": image, "tasks": tasks}
    return {name: trained(root / name, *overrides).run_dir for name, overrides in chosen.items()}


@pytest.fixture
def predict(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Predict:
    """What the command prints, line by line."""

    def run(model: str, *arguments: Any) -> list[dict[str, Any]]:
        assert main(["predict", str(runs[model]), *map(str, arguments)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]

    return run


@pytest.fixture
def refuse(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that the command refuses with; on standard output there is nothing."""

    def run(model: str, *arguments: Any) -> str:
        assert main(["predict", str(runs.get(model, model)), *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("clplatform: ")
        assert err.count("\n") == 1
        return err

    return run


def answers(run: Path, inputs: Any, **options: Any) -> list[dict[str, Any]]:
    """The same from Python, as it should be printed."""
    found = clplatform.load(run).predict(inputs, **options)
    return [{"label": p.label, "probability": p.probability, "probabilities": p.probabilities} for p in found]


def without_names(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "input"} for row in rows]


# -- texts --------------------------------------------------------------------------------------------------------------


def test_lines_of_text(predict: Predict, runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    path.write_text("\ufeff" + "\n".join([TEXTS[0], "", "   ", TEXTS[1], "Zoë's café \u2028 here"]) + "\r\n\n", "utf-8")
    rows = predict("text", path)
    expected = [TEXTS[0], TEXTS[1], "Zoë's café \u2028 here"]  # a line ends at its newline, nowhere else
    assert [row["input"] for row in rows] == expected
    assert without_names(rows) == answers(runs["text"], expected)
    assert list(rows[0]) == ["input", "label", "probability", "probabilities"]
    assert set(rows[0]["probabilities"]) < set(TOPICS) and len(rows[0]["probabilities"]) == 3


BLANK = {
    "txt": "\none\n \ntwo\n\n",
    "jsonl": '\n{"text": "one"}\n \n{"text": "two"}\n\n',
    "csv": 'text\n\none\n\n"two"\n\n',
}


@pytest.mark.parametrize("kind", BLANK)
def test_blank_lines_are_counted(kind: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    Path(f"new.{kind}").write_text(BLANK[kind])
    assert main(["predict", str(runs["text"]), f"new.{kind}"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["input"] for line in out.splitlines()] == ["one", "two"]
    first = 2 if kind == "csv" else 1
    assert err == f"clplatform: blank lines that are skipped: 3 (the first is new.{kind}:{first})\n"
    Path("none.txt").write_text("one\ntwo\n")
    Path("empty.txt").write_text("")
    assert main(["predict", str(runs["text"]), "none.txt", "empty.txt"]) == 0
    assert capsys.readouterr().err == ""


def test_blank_lines_of_standard_input(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n"))
    assert main(["predict", str(runs["text"])]) == 0
    assert "skipped: 1 (the first is standard input:2)\n" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["text", "pairs"])
def test_texts_that_are_cut_are_counted(model: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    long = "book a flight " * 100
    Path("new.jsonl").write_text(
        "".join(json.dumps({"text": t, "b": "jazz"}) + "\n" for t in (TEXTS[0], long, TEXTS[1]))
    )
    columns = ["--column", "text", "--column", "b"] if model == "pairs" else []
    assert main(["predict", str(runs[model]), "new.jsonl", *columns]) == 0
    out, err = capsys.readouterr()
    longest = clplatform.load(runs[model]).info.input.max_length
    assert err == f"clplatform: 1 of 3 texts are cut at the end to {longest} tokens\n"
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_line_ends_and_compression_change_nothing(kind: str, predict: Predict, tmp_path: Path) -> None:
    lines = ["text"] * (kind == "csv") + TEXTS
    contents = {
        f"new.{kind}": "\n".join(lines).encode(), f"windows.{kind}": "\r\n".join(lines).encode(),
        f"mac.{kind}": "\r".join(lines).encode(), f"packed.{kind}.gz": gzip.compress("\n".join(lines).encode()),
    }  # fmt: skip
    found = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found.append(predict("text", tmp_path / name))
    assert len(found[0]) == len(TEXTS) and all(rows == found[0] for rows in found)


@pytest.mark.parametrize("given", [[], ["-"]])
def test_standard_input(given: list[str], predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    assert [row["input"] for row in predict("text", *given)] == TEXTS


TABLES = {
    "csv": 'id,text,other\n1,"book a flight, please\nto paris",x\n2,what is my balance,"y"\n',
    "tsv": 'id\ttext\tother\n1\t"book a flight, please\nto paris"\tx\n2\twhat is my balance\ty\n',
    "jsonl": '{"text": "book a flight, please\\nto paris", "id": 1}\n\n{"id": 2, "text": "what is my balance"}\n',
    "ndjson": '{"text": "book a flight, please\\nto paris"}\r\n{"text": "what is my balance"}',
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_with_a_text_column(kind: str, predict: Predict, runs: dict[str, Path], tmp_path: Path) -> None:
    """A quoted text may go over several lines and hold the separator."""
    (tmp_path / f"new.{kind}").write_text(TABLES[kind])
    expected = ["book a flight, please\nto paris", "what is my balance"]
    rows = predict("text", tmp_path / f"new.{kind}")
    assert [row["input"] for row in rows] == expected
    assert without_names(rows) == answers(runs["text"], expected)
    (tmp_path / f"renamed.{kind}").write_text(TABLES[kind].replace("text", "query"))
    assert predict("text", "--column", "query", tmp_path / f"renamed.{kind}") == rows


def test_separators_of_unicode_stay_within_a_json_line(predict: Predict, tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert predict("text", "new.jsonl")[0]["input"] == text


def test_several_files_in_their_order(predict: Predict, tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS[:3]):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "2.txt").rename(tmp_path / "2.csv")
    (tmp_path / "2.csv").write_text(f"text\n{TEXTS[2]}\n")
    rows = predict("text", *(tmp_path / name for name in ("2.csv", "0.txt", "1.txt")))
    assert [row["input"] for row in rows] == [TEXTS[2], TEXTS[0], TEXTS[1]]


def test_pairs_of_texts(predict: Predict, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("a,b\nbook a flight,visa for japan\nwhat is my balance,open a savings account\n")
    rows = predict("pairs", tmp_path / "new.csv", "--column", "a", "--column", "b")
    pairs = [["book a flight", "visa for japan"], ["what is my balance", "open a savings account"]]
    assert [row["input"] for row in rows] == pairs
    assert without_names(rows) == answers(runs["pairs"], [tuple(pair) for pair in pairs])
    swapped = predict("pairs", tmp_path / "new.csv", "--column", "b", "--column", "a")
    assert without_names(swapped) != without_names(rows)


# -- images -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits() -> np.ndarray:
    return load_digits()[1][0][:6, 0].numpy()


def test_image_files_and_folders(predict: Predict, runs: dict[str, Path], tmp_path: Path, digits: np.ndarray) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(("b.png", "a.PNG", "c.bmp", "d.tiff")):
        Image.fromarray(digits[i]).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    Image.fromarray(digits[4]).save(tmp_path / "alone.png")
    expected = answers(runs["image"], digits[[1, 0, 2, 3]])  # by name
    rows = predict("image", folder)
    assert [row["input"] for row in rows] == [str(folder / name) for name in ("a.PNG", "b.png", "c.bmp", "d.tiff")]
    assert without_names(rows) == expected
    rows = predict("image", tmp_path / "alone.png", folder)
    assert rows[0]["input"] == str(tmp_path / "alone.png")
    batch = answers(runs["image"], digits[[4, 1, 0, 2, 3]])
    assert without_names(rows) == batch
    assert {".png", ".jpg", ".jpeg"} < IMAGES


def test_colour_and_other_sizes_are_made_to_fit(predict: Predict, tmp_path: Path, digits: np.ndarray) -> None:
    large = np.kron(digits[0], np.ones((4, 4), dtype=np.uint8))
    Image.fromarray(large).convert("RGB").save(tmp_path / "large.png")
    Image.fromarray(digits[0]).save(tmp_path / "small.png")
    large_row, small_row = predict("image", tmp_path / "large.png", tmp_path / "small.png")
    assert large_row["label"] == small_row["label"]
    assert large_row["probability"] == pytest.approx(small_row["probability"], abs=0.02)


@pytest.mark.parametrize("kind", ["bytes", "floats", "channels"])
def test_arrays(kind: str, predict: Predict, runs: dict[str, Path], tmp_path: Path, digits: np.ndarray) -> None:
    array = {"bytes": digits, "floats": digits / 255, "channels": digits[:, None]}[kind]
    np.save(tmp_path / "new.npy", array)
    rows = predict("image", tmp_path / "new.npy")
    assert [row["input"] for row in rows] == [f"{tmp_path / 'new.npy'}[{i}]" for i in range(6)]
    assert without_names(rows) == answers(runs["image"], digits)
    np.save(tmp_path / "none.npy", digits[:0])
    assert predict("image", tmp_path / "none.npy") == []


def test_options_stand_anywhere(predict: Predict, runs: dict[str, Path], tmp_path: Path, digits: np.ndarray) -> None:
    np.save(tmp_path / "new.npy", digits)
    expected = answers(runs["tasks"], digits, task=1, top=2)
    assert len(expected[0]["probabilities"]) == 2
    for arguments in (
        ("--task", 1, "--top", 2, tmp_path / "new.npy"),
        (tmp_path / "new.npy", "--top", 2, "--task", 1),
        ("--top=2", tmp_path / "new.npy", "--task=1"),
    ):
        assert without_names(predict("tasks", *arguments)) == expected


def test_the_model_folder_is_a_run_too(predict: Predict, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text(TEXTS[0])
    runs["model"] = runs["text"] / "model"
    assert predict("model", tmp_path / "new.txt") == predict("text", tmp_path / "new.txt")


# -- what is refused ----------------------------------------------------------------------------------------------------

FILES: dict[str, bytes] = {
    "latin.txt": "first\nZoë".encode("latin-1"),
    "empty.txt": b"\n \n",
    "header.csv": b"text,label\n",
    "wrong.csv": b"query,label\na,b\n",
    "short.csv": b"label,text\nb\n",
    "long.csv": b"text\ngood\nhello, world\n",
    "blank.csv": b"text,label\n\"a\nb\",x\n ,y\n",
    "open.csv": b"text,label\n\"a,x\nb,y\n",
    "broken.jsonl": b"{\"text\": \"a\"}\n{\"text\": \n",
    "list.jsonl": b"[\"a\"]\n",
    "number.jsonl": b"{\"text\": 3}\n",
    "texts.json": b"[{\"text\": \"a\"}]",
    "fake.png": b"not an image",
    "bad.npy": b"\x93NUMPY and nothing more",
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("text", ["absent.txt"], "there is no file absent.txt"),
        ("text", ["."], ".: not a text file in UTF-8"),
        ("text", ["latin.txt"], "latin.txt:2: not UTF-8 (byte 0xeb); save the file in that encoding"),
        ("text", ["empty.txt"], "there is no text to classify"),
        ("text", ["header.csv"], "there is no text to classify"),
        ("text", ["wrong.csv"], "wrong.csv:2: there is no column 'text' (there is: query, label); use --column"),
        ("text", ["short.csv"], "short.csv:2: the column 'text' has no text (None)"),
        ("text", ["long.csv"], "long.csv:3: the row has more cells than the header; quote texts"),
        ("text", ["blank.csv"], "blank.csv:4: the column 'text' has no text (' ')"),
        ("text", ["open.csv"], "open.csv:3: unexpected end of data"),
        ("text", ["broken.jsonl"], "broken.jsonl:2: not JSON"),
        ("text", ["list.jsonl"], "list.jsonl:1: not a JSON object"),
        ("text", ["number.jsonl"], "number.jsonl:1: the column 'text' has no text (3)"),
        ("text", ["texts.json"], "texts.json: the model classifies text: give text lines (.txt), .csv, .tsv or .jsonl"),
        ("text", ["fake.png"], "fake.png: the model classifies text"),
        ("text", ["new.txt", "--task", "1"], "task 1: the model has learned tasks [0]"),
        ("text", ["new.txt", "--top", "0"], "top=0: give 1 or more"),
        ("text", ["new.txt", "--top", "many"], "invalid int value: 'many'"),
        ("text", ["new.txt", "--tpo", "1"], "--tpo"),
        ("pairs", ["pairs.csv", "--column", "a", "--column", "c"], "pairs.csv:2: there is no column 'c'"),
        ("image", [], "nothing is given; the model classifies images"),
        ("image", ["absent.png"], "there is no file absent.png; the model classifies images"),
        ("image", ["fake.png"], "fake.png is not an image that can be read"),
        ("image", ["nothing"], "there is no image in the input"),
        ("image", ["bad.npy"], "bad.npy is not an array that can be read"),
        ("image", ["pickled.npy"], "pickled.npy is not an array that can be read (Object arrays cannot be loaded"),
        ("image", ["one.npy"], "one.npy holds float64 []; numbers [N, height, width] are needed"),
        ("image", ["words.npy"], "words.npy holds <U1 [2]; numbers"),
        ("image", ["flat.npy"], "not [3, 64]"),
        ("image", ["flat.npy", "new.png"], "flat.npy: an array is classified alone"),
        ("tasks", ["new.png"], "the model was trained with task ids: say which task, of [0, 1]"),
        ("tasks", ["new.png", "--task", "7"], "task 7: the model has learned tasks [0, 1]"),
        (".", ["new.png"], ". is neither a run directory nor a saved model"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    model: str, arguments: list[str], message: str, refuse: Callable[..., str], tmp_path: Path
) -> None:
    for name, content in FILES.items():  # in the working directory
        (tmp_path / name).write_bytes(content)
    (tmp_path / "new.txt").write_text(TEXTS[0])
    (tmp_path / "pairs.csv").write_text("a,b\none,two\n")
    (tmp_path / "nothing").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "new.png")
    np.save(tmp_path / "one.npy", np.array(3.0))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "flat.npy", np.zeros((3, 64)))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert message in refuse(model, *arguments)


def test_a_text_model_asked_twice_for_a_column_is_refused_by_what_it_was_trained_on(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """A pair is one input of the tokenizer, so a model of single texts reads it too: with their separator."""
    (tmp_path / "new.csv").write_text("a,b\none,two\n")
    assert main(["predict", str(runs["text"]), "new.csv", "--column", "a", "--column", "b"]) == 0
    assert main(["predict", str(runs["text"]), "new.csv", "--column", "a", "--column", "b", "--column", "a"]) == 2


def test_classes_from_elsewhere_need_trust(
    predict: Predict, refuse: Callable[..., str], runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("from clplatform.head.linear import LinearHead\nclass Head(LinearHead): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(runs["text"] / "model", tmp_path / "model")
    path = tmp_path / "model" / "clplatform.json"
    path.write_text(path.read_text().replace("clplatform.head.linear.LinearHead", "mine.Head"))
    (tmp_path / "new.txt").write_text(TEXTS[0])
    runs["mine"] = tmp_path / "model"
    assert "builds 'mine.Head'" in refuse("mine", "new.txt")
    assert predict("mine", "new.txt", "--trust", "mine.") == predict("text", "new.txt")


def test_answers_are_numbers_that_add_up(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("\n".join(TEXTS))
    for row in predict("text", "new.txt", "--top", 4):
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert max(row["probabilities"], key=row["probabilities"].get) == row["label"]
        assert torch.tensor(list(row["probabilities"].values())).diff().le(0).all()  # best first
