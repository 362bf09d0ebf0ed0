"""Plain text from files and folders: what is a domain, where it is cut, what is refused."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pytest

from clplatform.stream.plain_text import cut, find_domains, hold_out, name_domains, read_domain, read_plain, split
from clplatform.types import ClplatformError

LINES = "".join(f"line {i} of this text\n" for i in range(100))


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def write(path: Path | str, text: str | bytes) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, **options: Any) -> Any:
    return read_domain("d", path, **{"limit": None, "validation_fraction": 0.1, "test_fraction": 0.2, **options})


# --- cutting


def test_splits_are_contiguous_and_cut_at_line_ends() -> None:
    domain = split("d", [LINES], 0.1, 0.2, [])
    assert "".join(domain.train + domain.validation + domain.test) == LINES
    for part, fraction in ((domain.train, 0.7), (domain.validation, 0.1), (domain.test, 0.2)):
        text = "".join(part)
        assert text.endswith("\n") and text.startswith("line")
        assert abs(len(text) / len(LINES) - fraction) < 0.012


def test_cuts_lose_nothing_whatever_the_documents() -> None:
    source = random.Random(0)
    for _ in range(500):
        documents = [
            "".join(source.choice("ab \n") for _ in range(source.randrange(1, 12)))
            for _ in range(source.randrange(1, 5))
        ]
        n = sum(map(len, documents))
        for up in (True, False):
            at = source.randrange(n + 1)
            first, second = cut(documents, at, up=up)
            assert "".join(first + second) == "".join(documents)
            assert all(first) and all(second)
            assert up or len("".join(first)) <= at
            if up and at < n:
                assert second


@pytest.mark.parametrize(
    ("text", "at", "up", "first"),
    [
        ("one\ntwo\nthree", 5, True, "one\ntwo\n"), ("one\ntwo\nthree", 5, False, "one\n"),
        ("one\ntwo three", 6, True, "one\n"), ("one two three", 5, True, "one two "), ("one two three", 5, False, "one "),
        ("onetwothree", 5, True, "onetw"), ("onetwothree", 5, False, "onetw"), ("one\ntwo\n", 5, True, "one\n"),
        ("one\ntwo\n", 4, False, "one\n"), ("one\ntwo\n", 8, False, "one\ntwo\n"), ("one\ntwo\n", None, False, "one\ntwo\n"),
    ],
)  # fmt: skip
def test_where_a_text_is_cut(text: str, at: int | None, up: bool, first: str) -> None:
    assert "".join(cut([text], at, up=up)[0]) == first


def test_documents_are_cut_between_or_within() -> None:
    assert cut(["ab\ncd\n", "ef\ngh\n", "ij\n"], 6) == (["ab\ncd\n"], ["ef\ngh\n", "ij\n"])
    assert cut(["ab\ncd\n", "ef\ngh\n", "ij\n"], 10) == (["ab\ncd\n", "ef\n"], ["gh\n", "ij\n"])
    assert cut(["abcd", "efgh", "ij"], 5, up=True) == (["abcd", "e"], ["fgh", "ij"])


def test_too_little_text_to_hold_some_out() -> None:
    message = refusal(split, "tiny", ["a"], 0.1, 0.1, [])
    assert message.startswith("the domain 'tiny' has 1 characters, too few lines to hold out 10%: give it more text")
    assert "the domain 'tiny' has no test file" in refusal(split, "tiny", [LINES], 0.1, 0.0, [])
    assert hold_out("tiny", ["a"], 0.0) == (["a"], [])


# --- files


def test_each_file_and_each_folder_of_files_is_a_domain(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.txt.gz",
        "c/1.txt",
        "c/deep/2.txt",
        "SOURCE.txt",
        "README.txt",
        "notes.pdf",
        ".hidden.txt",
    ):
        write(tmp_path / name, gzip.compress(LINES.encode()) if name.endswith(".gz") else LINES)
    write(tmp_path / "d" / "README.txt", "about")
    assert list(find_domains(tmp_path, [])) == ["a", "b", "c"]
    domain = read(tmp_path / "c")
    assert "".join(domain.train + domain.validation + domain.test) == LINES * 2
    assert read(tmp_path / "a.txt.gz").train == read(tmp_path / "b.txt").train
    assert refusal(find_domains, tmp_path / "d", []).startswith(
        f"{tmp_path / 'd'} holds no text: each file in it (.txt, "
    )
    message = refusal(name_domains, [tmp_path / "b.txt", tmp_path / "c" / "b.txt"])
    assert (
        message == f"{tmp_path / 'b.txt'} and {tmp_path / 'c' / 'b.txt'}: two domains are named 'b'; rename one of them"
    )


@pytest.mark.parametrize(
    "names", [("train.txt", "valid.txt", "test.txt"), ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
              ("train/a.txt", "dev/a.txt", "test/a.txt"), ("news_train.txt", "news_val.txt", "news_test.txt")],
)  # fmt: skip
def test_files_of_the_splits(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for name in names:
        write(tmp_path / name, f"{name}\n" * 40)
    domain = read(tmp_path)
    assert [set("".join(p).split()) for p in (domain.train, domain.validation, domain.test)] == [{n} for n in names]
    assert "".join(read(tmp_path, limit=3 * len(names[0]) + 5).train) == f"{names[0]}\n" * 3
    (tmp_path / names[1]).unlink()
    domain = read(tmp_path, test_fraction=0.0)  # there is a file: it is not asked for
    assert "".join(domain.train + domain.validation) == f"{names[0]}\n" * 40 and len(domain.validation[0]) > 20
    assert read(tmp_path, validation_fraction=0.0).validation == []


def test_files_that_say_no_split_are_noted_and_one_that_says_two_is_refused(tmp_path: Path) -> None:
    for name in ("train.txt", "test.txt", "extra.txt", "more/extra.txt"):
        write(tmp_path / name, f"{name}\n" * 40)
    domain = read(tmp_path)
    assert domain.notes == ["files of d whose names say no split are left out: 2 (extra.txt, more/extra.txt)"]
    assert not any("extra" in "".join(part) for part in (domain.train, domain.validation, domain.test))
    two = write(tmp_path / "train_dev.txt", LINES)
    assert refusal(read, tmp_path) == f"{two}: its name says both train and dev, and a file is of one split: rename it"
    two.unlink()
    two = write(tmp_path / "test" / "a_train.txt", LINES)
    assert refusal(read, tmp_path).startswith(f"{two}: its name says both test and train")
    two.unlink()
    (tmp_path / "test.txt").unlink()
    assert read(tmp_path).notes == [
        "d has files for train by their names, but not for both train and test: all of its files are taken together, and split "
        "by shares"
    ]
    (tmp_path / "train.txt").unlink()
    assert not read(tmp_path).notes  # no name says anything


def test_files_that_are_no_text_by_their_names_are_noted(tmp_path: Path) -> None:
    for name in ("a/1.txt", "a/README.txt", "a/b/notes.md", "a/b/table.tsv", "a/.hidden/c.md", "a/source.txt", "x.txt"):
        write(tmp_path / name, LINES)
    assert read(tmp_path / "a").notes == [
        "files of d without text by their names are left out: 4 (README.txt, b/notes.md, b/table.tsv, …)"
    ]
    assert read(tmp_path / "x.txt").notes == []
    for name in ("LICENSE", "about/README.md", ".git/c.txt"):
        write(tmp_path / name, LINES)
    assert list(find_domains(tmp_path, notes := [])) == ["a", "x"]
    assert notes == [
        f"files and folders of {tmp_path.name} without text by their names are left out: 2 (LICENSE, about)"
    ]


def test_a_folder_may_be_within_a_hidden_one(tmp_path: Path) -> None:
    write(tmp_path / ".data" / "texts" / "a" / "1.txt", LINES)
    assert list(find_domains(tmp_path / ".data" / "texts", [])) == ["a"]


def test_a_limit_is_of_whole_lines(tmp_path: Path) -> None:
    domain = read(write(tmp_path / "a.txt", LINES), limit=500)
    text = "".join(domain.train + domain.validation + domain.test)
    assert text == LINES[: len(text)] and text.endswith("\n") and 470 < len(text) <= 500
    assert domain.notes == [f"stream.limit keeps {len(text)} of {len(LINES):,} characters of d"]
    assert read(tmp_path / "a.txt", limit=len(LINES)).notes == []
    for name in ("train", "test"):
        write(tmp_path / "b" / f"{name}.txt", LINES)
    assert [note.split(" of ")[-2:] for note in read(tmp_path / "b", limit=500).notes] == [
        ["the train text", "d"], ["the test text", "d"]
    ]  # fmt: skip


def test_what_is_no_text(tmp_path: Path) -> None:
    assert refusal(read, write(tmp_path / "empty.txt", "\n \n")) == f"{tmp_path / 'empty.txt'} holds no text"
    latin = write(tmp_path / "latin.txt", "fine\nfine\ncafé\n".encode("latin-1"))
    message = f"{latin}:3: not UTF-8 (byte 0xe9); save the file in that encoding"
    assert refusal(read_plain, latin) == message
    mixed = write(tmp_path / "mixed.txt", "café\n".encode() + "café\n".encode("latin-1"))
    assert refusal(read_plain, mixed).startswith(f"{mixed}:2: not UTF-8")
    wide = write(tmp_path / "wide.txt", "ok\nok\n".encode("utf-16-be"))
    assert refusal(read_plain, wide).startswith(f"{wide}:1: a zero byte")
    broken = write(tmp_path / "broken.txt.gz", gzip.compress(LINES.encode())[:-20])
    assert refusal(read_plain, broken).startswith(f"{broken} is damaged")


def test_empty_documents_of_a_folder_are_left_out_with_a_note(tmp_path: Path) -> None:
    for i, text in enumerate((LINES, "", LINES)):
        write(tmp_path / f"{i}.txt", text)
    domain = read(tmp_path)
    assert "".join(domain.train + domain.validation + domain.test) == LINES * 2
    assert domain.notes == [f"1 files without text are left out ({tmp_path / '1.txt'}, …)"]
