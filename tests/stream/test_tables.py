"""Tables: what is read equals what pandas and json read; what is not as it should be is refused, with its line."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pandas as pd
import pytest

from clplatform.stream.tables import read_table
from clplatform.types import ClplatformError

# Pieces that readers get wrong: separators and quotes within texts, line ends, words that mean "none", numbers.
PIECES = ["a", "Zoë", "日本", " ", ",", "\t", '"', '""', "\n", "\r\n", "\u2028", "\x85", "#", "NA", "null", "nan", "01", "1e3",
          "True", "\\", "'", ";", "☃"]  # fmt: skip


def random_rows(seed: int, n: int = 60) -> list[list[str]]:
    draw = random.Random(seed)
    return [["x" + "".join(draw.choices(PIECES, k=draw.randint(0, 6))) for _ in range(3)] for _ in range(n)]


def refusal(content: str | bytes, name: str = "t.csv", needed: tuple[str, ...] = ("text", "label")) -> str:
    """The message for a file with this content, without the file's name."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ClplatformError) as caught:
        read_table(name, needed)
    message = str(caught.value)
    assert message.startswith(name)
    return message.removeprefix(name).removeprefix(":")


# --- against other readers


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_cells_that_pandas_reads(seed: int, suffix: str, separator: str, line_end: str) -> None:
    rows, path = random_rows(seed), Path(f"t{suffix}")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator, lineterminator=line_end).writerows([["text", "other", "label"], *rows])
    table = read_table(str(path), ["label", "text"])
    reference = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    for column, place in (("text", 0), ("label", 2)):
        assert table.columns[column] == reference[column].tolist() == [row[place] for row in rows]
    assert len(table.lines) == len(rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_has_the_line_that_it_begins_at(seed: int) -> None:
    """Written one by one, with blank lines between some, and their lines noted."""
    draw, lines, texts = random.Random(seed), [], []
    with Path("t.csv").open("w", newline="") as file:
        file.write("\ntext,label\n")
        for text, _, label in random_rows(seed):
            file.write("\n" * draw.choice([0, 0, 1, 3]))
            file.flush()
            lines.append(len(Path("t.csv").read_text().split("\n")))  # a line ends with \n or \r\n
            csv.writer(file, lineterminator="\n").writerow([text, label])
            texts.append(text)
    table = read_table("t.csv", ["text", "label"])
    assert list(table.lines) == lines
    assert table.columns["text"] == texts


def test_old_line_ends_and_a_byte_order_mark() -> None:
    for content in ("text,label\rhi,a\rho,b\r", "\ufefftext,label\nhi,a\nho,b", "text,label\nhi,a\nho,b\n   \n"):
        Path("t.csv").write_text(content, newline="", encoding="utf-8")
        table = read_table("t.csv", ["text", "label"])
        assert (table.columns, list(table.lines)) == ({"text": ["hi", "ho"], "label": ["a", "b"]}, [2, 3])


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_lines(suffix: str, ascii_only: bool) -> None:
    rows = [{"text": t, "label": i, "more": {"deep": [o]}} for i, (t, o, _) in enumerate(random_rows(7))]
    path = Path(f"t{suffix}")
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + "\n", encoding="utf-8")
    table = read_table(str(path), ["text", "label"])
    reference = pd.read_json(path, lines=True, dtype=False)
    assert table.columns["text"] == reference["text"].tolist() == [row["text"] for row in rows]
    assert table.columns["label"] == reference["label"].tolist()
    assert list(table.lines) == list(range(1, 2 * len(rows), 2))


def test_parquet() -> None:
    rows = random_rows(8)
    frame = pd.DataFrame(rows, columns=["text", "other", "label"], index=range(100, 100 + len(rows)))
    frame["number"] = range(len(rows))
    frame["label"] = frame["label"].astype("category")
    frame.to_parquet("t.parquet")
    table = read_table("t.parquet", ["text", "label", "number"])
    assert table.columns == {
        "text": [r[0] for r in rows],
        "label": [r[2] for r in rows],
        "number": list(range(len(rows))),
    }
    assert list(table.lines) == list(range(1, len(rows) + 1))


def test_a_long_cell_is_read_and_the_limit_of_others_stays() -> None:
    before = 100_000
    csv.field_size_limit(before)
    long = "word " * 60_000
    Path("t.csv").write_text(f"text,label\n{long},a\n")
    assert read_table("t.csv", ["text"]).columns["text"] == [long]
    assert csv.field_size_limit() == before
    refusal("text,label\nhi,a,b\n")
    assert csv.field_size_limit() == before


def test_short_rows_are_filled_up() -> None:
    Path("t.csv").write_text("text,label,comment\nhi,a\nho,b,nice\n")
    assert read_table("t.csv", ["label", "comment"]).columns == {"label": ["a", "b"], "comment": ["", "nice"]}


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "home.csv").write_text("text\nhi there\n")
    assert read_table("~/home.csv", ["text"]).columns == {"text": ["hi there"]}


# --- refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " is empty: the names of the columns are needed in its first line"),
        ("text,intent\nhi,a\n", "1: there is no column 'label' (there is: 'text', 'intent')"),
        ("\n\ntext, label\nhi,a\n", "3: there is no column 'label' (there is: 'text', ' label')"),
        ("text;label\nhi;a\n", "1: there is no column 'text' (there is: 'text;label'); .csv files have commas between the "
                               "cells, .tsv files tabs"),
        ("text,label,text\nhi,a,b\n", "1: 2 columns are named 'text'"),
        ("text,label\nhi,a\nho, well,b\n", "3: the row has 3 cells, the header 2; quote texts that hold a separator"),
        ("text,label\n\n\"two\nlines\",a\n\nho,b,c\n", "6: the row has 3 cells, the header 2"),
        ("text,label\nhi,a\n\"never closed,b\nho,c\n", "3: the row cannot be read (unexpected end of data); a cell that "
                                                       "begins with a quote ends with one, and quotes within it are doubled"),
        ('text,label\n"Hi" he said,a\n', "2: the row cannot be read (',' expected after '\"')"),
        ("text,label\nhi,a\ncafé,b\n".encode("latin-1"), "3: not UTF-8 (byte 0xe9); save the file in that encoding"),
        ("text,label\nhi,a\n".encode("utf-16"), "1: not UTF-8 (byte 0xff); save the file in that encoding"),
    ],
)  # fmt: skip
def test_a_csv_file_that_is_none(content: str | bytes, message: str) -> None:
    assert refusal(content).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "hi", "label": "a"}\n\n{"text": "ho", "label": }\n', "3: not JSON (Expecting value, column 2"),
        ('{"text": "hi", "label": "a"}\n["ho", "b"]\n', "2: not a JSON object, such as {'text': …}"),
        ('[\n{"text": "hi", "label": "a"}\n]\n', "1: not JSON (Expecting value, column 2)"),
        ('{"text": "hi", "label": "a"}\n{"text": "ho", "intent": "b"}\n',
         "2: there is no column 'label' (there is: 'text', 'intent')"),
        ('{"text": "hi", "label": "a"}\n{"text": "caf\xe9"}\n'.encode("latin-1"), "2: not UTF-8 (byte 0xe9)"),
    ],
)  # fmt: skip
def test_json_lines_that_are_none(content: str | bytes, message: str) -> None:
    assert refusal(content, "t.jsonl").startswith(message)


def test_a_parquet_file_that_is_none() -> None:
    assert refusal("text,label\nhi,a\n", "t.parquet").startswith(" not a Parquet file that can be read (Parquet")
    pd.DataFrame({"text": ["hi"] * 50, "intent": ["a"] * 50}).to_parquet("good.parquet")
    content = Path("good.parquet").read_bytes()
    assert refusal(content, "t.parquet") == " there is no column 'label' (there is: 'text', 'intent')"
    assert refusal(content[:-9], "t.parquet").startswith(" not a Parquet file that can be read (")


def test_a_file_that_is_missing_or_of_another_kind() -> None:
    with pytest.raises(ClplatformError, match=r"^there is no file nowhere\.csv$"):
        read_table("nowhere.csv", ["text"])
    Path("folder.csv").mkdir()
    with pytest.raises(ClplatformError, match=r"^folder\.csv is a folder, not a file$"):
        read_table("folder.csv", ["text"])
    for name, what in (("t.json", ".json"), ("t", "nothing"), ("t.csv.gz", ".gz")):
        assert refusal("", name) == f" files end in .csv, .tsv, .jsonl or .parquet, not {what}"
