"""Plain text from files and folders: what is a domain, what is held out of it, with errors that name file and line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from clplatform.stream.notes import left_out, limited
from clplatform.stream.tables import read_text
from clplatform.types import ClplatformError

SUFFIXES = (".txt", ".text", ".tokens", ".raw")  # and each with .gz
ABOUT = {"about", "changelog", "citation", "copying", "licence", "license", "notice", "readme", "source", "sources"}
SPLITS = {"train": {"train"}, "validation": {"dev", "val", "valid", "validation"}, "test": {"test"}}


@dataclass
class Domain:
    """A domain's documents, by split; no text is in two of them.

    Args:
        notes: facts for the report.
    """

    name: str
    train: list[str]
    validation: list[str]
    test: list[str]
    notes: list[str] = field(default_factory=list)


def is_text(path: Path) -> bool:
    """Is this a file of text, by its name, and not one about the data?"""
    name = path.name.lower().removesuffix(".gz")
    stem = re.split(r"\W", name)[0]
    return path.is_file() and name.endswith(SUFFIXES) and stem not in ABOUT and not name.startswith(".")


def text_files_in(folder: Path) -> list[Path]:
    """The text files of a folder and of those within it, in the order of their names."""
    return sorted(p for p in folder.rglob("*") if is_text(p) and not _hidden(p.relative_to(folder)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def others_in(folder: Path, read: Sequence[Path]) -> list[Path]:
    """The files of a folder, and of those within it, that are not read; hidden ones are not meant to be."""
    files = set(folder.rglob("*")) - set(read)
    return sorted(p for p in files if p.is_file() and not _hidden(p.relative_to(folder)))


def find_domains(folder: Path, notes: list[str]) -> dict[str, Path]:
    """The domains of a folder by name: each of its text files, and each folder in it that holds some.

    Args:
        notes: get one on what else is there.

    Raises:
        ClplatformError: there is none.
    """
    there = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    found = [p for p in there if is_text(p) or (p.is_dir() and text_files_in(p))]
    if not found:
        raise ClplatformError(
            f"{folder} holds no text: each file in it ({', '.join(SUFFIXES)}; .gz too), or folder of files, is a domain"
        )
    others = [p for p in there if p not in found]
    notes += left_out(f"files and folders of {folder.name} without text by their names", others, folder)
    return name_domains(found)


def name_domains(paths: Sequence[Path]) -> dict[str, Path]:
    """Domains by name: that of the file without its ending, or of the folder.

    Raises:
        ClplatformError: two have the same.
    """
    named: dict[str, Path] = {}
    for path in paths:
        name = path.name if path.is_dir() else re.sub(rf"({'|'.join(map(re.escape, SUFFIXES))})(\.gz)?$", "", path.name)
        if name in named:
            raise ClplatformError(f"{named[name]} and {path}: two domains are named {name!r}; rename one of them")
        named[name] = path
    return named


def read_domain(
    name: str, path: Path, *, limit: int | None, validation_fraction: float, test_fraction: float
) -> Domain:
    """A domain from its file, or from a folder of files: of a file for each split where their names say so
    (`train.txt`, `wiki.valid.tokens`, …), else of documents in the order of their names. What is not used is noted.

    Args:
        limit: characters that are read of the domain, or of each of its split files, up to the end of a line.
        validation_fraction, test_fraction: of its characters, from the end; only what no file has.

    Raises:
        ClplatformError: a file is no text, there is none, or too little to be split; the name of one says two splits.
    """
    notes: list[str] = []
    texts, files = [path], {split: [] for split in SPLITS}
    if path.is_dir():
        texts = text_files_in(path)
        files = by_split(path, texts)
        notes += left_out(f"files of {name} without text by their names", others_in(path, texts), path)
    if files["train"] and files["test"]:
        notes += left_out(f"files of {name} whose names say no split", without_split(path, texts), path)
        parts = {
            s: _first(_documents(of, notes), limit, f"the {s} text of {name}", notes) if of else []
            for s, of in files.items()
        }
        if not parts["validation"]:
            parts["train"], parts["validation"] = hold_out(name, parts["train"], validation_fraction)
        return Domain(name, **parts, notes=notes)
    if said := [s for s, of in files.items() if of]:
        notes.append(
            f"{name} has files for {' and '.join(said)} by their names, but not for both train and test: all of its files are "
            "taken together, and split by shares"
        )
    documents = _first(_documents(texts, notes), limit, name, notes)
    return split(name, documents, validation_fraction, test_fraction, notes)


def _first(documents: list[str], limit: int | None, what: str, notes: list[str]) -> list[str]:
    """The first documents, of so many characters; a note says what is left out."""
    kept, rest = cut(documents, limit)
    sizes = [sum(map(len, part)) for part in (kept, rest)]
    notes += limited("limit", sizes[0], sum(sizes), f"characters of {what}")
    return kept


def by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split by the words of their names, and of the names of folders within this one."""
    said = {p: _split_words(folder, p) for p in files}
    return {split: [p for p in files if split in said[p]] for split in SPLITS}


def without_split(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The files whose names say no split.

    Raises:
        ClplatformError: the name of one says two, and no text may be in both.
    """
    said = {p: _split_words(folder, p) for p in files}
    for path, words in said.items():
        if len(words) > 1:
            raise ClplatformError(
                f"{path}: its name says both {' and '.join(words.values())}, and a file is of one split: rename it"
            )
    return [p for p, words in said.items() if not words]


def _split_words(folder: Path, file: Path) -> dict[str, str]:
    """The splits that a file's name says, each with its word."""
    words = re.split(r"[\W_]", file.relative_to(folder).as_posix().lower())
    return {split: word for word in words for split, own in SPLITS.items() if word in own}


def _documents(files: Sequence[Path], notes: list[str]) -> list[str]:
    """The texts of files; what is empty is left out, with a note."""
    texts = [read_plain(f) for f in files]
    empty = [str(f) for f, text in zip(files, texts, strict=True) if not text.strip()]
    if len(empty) == len(files):
        raise ClplatformError(f"{files[0] if files else 'the folder'} holds no text")
    if empty:
        notes.append(f"{len(empty)} files without text are left out ({empty[0]}, …)")
    return [text for text in texts if text.strip()]


def read_plain(file: Path) -> str:
    """A file of text in UTF-8.

    Raises:
        ClplatformError: it is something else; with the line.
    """
    text = read_text(file)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ClplatformError(f"{file}:{line}: a zero byte: this is no text in UTF-8; save the file in that encoding")
    return text


# -- splitting --------------------------------------------------------------------------------------------------


def split(
    name: str, documents: list[str], validation_fraction: float, test_fraction: float, notes: list[str]
) -> Domain:
    """Documents as training, then validation, then test text: contiguous, cut at line ends.

    Raises:
        ClplatformError: there is no test text, or nothing is left to train on.
    """
    if test_fraction <= 0:
        raise ClplatformError(
            f"stream.test_fraction={test_fraction}: the domain {name!r} has no test file; hold some out"
        )
    rest, test = hold_out(name, documents, test_fraction)
    train, validation = hold_out(name, rest, min(1.0, validation_fraction / (1 - test_fraction)))
    return Domain(name, train, validation, test, notes)


def hold_out(name: str, documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The documents without their last characters, of which there are `fraction`, and these.

    Raises:
        ClplatformError: one of the two is empty.
    """
    if fraction <= 0:
        return documents, []
    kept, held = cut(documents, round((1 - fraction) * sum(map(len, documents))), up=True)
    if not any(t.strip() for t in kept) or not any(t.strip() for t in held):
        raise ClplatformError(
            f"the domain {name!r} has {sum(map(len, documents))} characters, too few lines to hold out {fraction:.0%}: "
            "give it more text, or smaller stream.validation_fraction and stream.test_fraction"
        )
    return kept, held


def cut(documents: list[str], at: int | None, *, up: bool = False) -> tuple[list[str], list[str]]:
    """Documents before and after a number of characters (None: all): cut after the last line end before it or, if `up`,
    the next one after it; in a document without line ends at a space, or else just there."""
    if at is None or at >= sum(map(len, documents)):
        return documents, []
    ends = list(accumulate(map(len, documents)))
    i = next(i for i, end in enumerate(ends) if end > at)
    last = i == len(documents) - 1
    place = _line_end(documents[i], at - (ends[i] - len(documents[i])), up, len(documents[i]) - last)
    first, second = documents[i][:place], documents[i][place:]
    return [*documents[:i], *([first] if first else [])], [*([second] if second else []), *documents[i + 1 :]]


def _line_end(text: str, at: int, up: bool, latest: int) -> int:
    """A place near `at` where a line (or else a word) ends, and not after `latest`."""
    for sign in "\n ":
        before, after = text.rfind(sign, 0, at) + 1, text.find(sign, at) + 1
        if up and 0 < after <= latest:
            return after
        if before:
            return before
    return at
