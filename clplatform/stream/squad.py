"""Questions about texts in SQuAD's format (Rajpurkar et al. 2016; with questions that have no answer: Rajpurkar et al. 2018)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clplatform.stream.notes import left_out
from clplatform.stream.plain_text import SPLITS, by_split, others_in, without_split
from clplatform.stream.text_files import check_text, read_json
from clplatform.types import ClplatformError

SUFFIX = re.compile(r"\.json(\.gz)?$")


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Args:
        answers: texts that answer it and where they begin in the context; none: it has no answer there.
        where: for messages.
    """

    text: str
    context: str
    answers: tuple[tuple[str, int], ...]
    where: str

    @property
    def references(self) -> list[str]:
        """The answers' texts, each once; `""` is the answer of a question that has none."""
        return list(dict.fromkeys(text for text, _ in self.answers)) or [""]


@dataclass
class QuestionDomain:
    """A domain's questions by split; no file is in two of them, and no context that was held out.

    Args:
        notes: facts for the report.
    """

    name: str
    train: list[Question]
    validation: list[Question]
    test: list[Question]
    notes: list[str] = field(default_factory=list)

    def splits(self) -> dict[str, list[Question]]:
        """Those that there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: questions for name, questions in named.items() if questions}


def read_squad(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        ClplatformError: it is not in SQuAD's format, or an answer does not stand where it says; with the question.
    """
    content = read_json(path)
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list):
        raise ClplatformError(
            f'{path}: not in SQuAD\'s format ({{"data": [{{"paragraphs": [{{"context": …, "qas": […]}}]}}]}})'
        )
    found = [q for i, article in enumerate(articles) for q in _questions(f"{path}: article {i + 1}", article)]
    if not found:
        raise ClplatformError(f"{path} holds no question")
    return found


def _questions(where: str, article: Any) -> Iterator[Question]:
    for j, paragraph in enumerate(_list(where, article, "paragraphs")):
        place = f"{where}, paragraph {j + 1}"
        rows = _list(place, paragraph, "qas")
        context = paragraph.get("context")
        check_text(place, "the context", context)
        for k, row in enumerate(rows):
            name = row.get("id", k + 1) if isinstance(row, dict) else k + 1
            yield _question(f"{place}, question {name}", row, context)


def _question(where: str, row: Any, context: str) -> Question:
    text = row.get("question") if isinstance(row, dict) else None
    check_text(where, "the question", text)
    assert isinstance(text, str)
    if row.get("is_impossible") and not row.get("answers"):
        return Question(text, context, (), where)
    answers = []
    for answer in _list(where, row, "answers"):
        words, start = (
            (answer.get(key) for key in ("text", "answer_start")) if isinstance(answer, dict) else (None, None)
        )
        check_text(where, "the answer", words)
        assert isinstance(words, str)
        if not isinstance(start, int) or start < 0 or context[start : start + len(words)] != words:
            raise ClplatformError(f"{where}: the answer {words!r} is not in the context at answer_start={start}")
        answers.append((words, start))
    return Question(text, context, tuple(answers), where)


def _list(where: str, value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise ClplatformError(f"{where} has no list {key!r}")
    return found


# -- domains ------------------------------------------------------------------------------------------------------------


def json_files(folder: Path) -> list[Path]:
    """The JSON files of a folder and of those within it, in the order of their names."""
    files = [p for p in folder.rglob("*") if p.is_file() and SUFFIX.search(p.name)]
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def name_squads(paths: Sequence[Path]) -> dict[str, Path]:
    """Domains by name: that of the file without its ending, or of the folder.

    Raises:
        ClplatformError: two have the same, or there is none.
    """
    named: dict[str, Path] = {}
    for path in paths:
        name = SUFFIX.sub("", path.name)
        if name in named:
            raise ClplatformError(f"{named[name]} and {path}: two domains are named {name!r}; rename one of them")
        named[name] = path
    return named


def read_questions(name: str, path: Path, *, validation_fraction: float, test_fraction: float) -> QuestionDomain:
    """A domain from its file, or from a folder of files: of a file for each split where their names say so (`train-v1.1.json`
    and `dev-v1.1.json`, which is the test split if no file is named so). Files that are not used are noted.

    Args:
        validation_fraction, test_fraction: of its contexts, from the end; only what no file has.

    Raises:
        ClplatformError: there is no file, the name of one says two splits, or there are too few contexts.
    """
    files = json_files(path) if path.is_dir() else [path]
    if not files:
        raise ClplatformError(f"{path} holds no .json file")
    notes: list[str] = []
    of_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
    if path.is_dir():
        of_split = by_split(path, files)
        notes += left_out(f"files of {name} that are not .json", others_in(path, files), path)
    if not of_split["test"]:  # as SQuAD's own is published
        of_split["test"], of_split["validation"] = of_split["validation"], []
    if not (of_split["train"] and of_split["test"]):
        rest, test = _hold_out(name, [q for p in files for q in read_squad(p)], test_fraction, "test_fraction")
        fraction = min(1.0, validation_fraction / (1 - test_fraction))
        train, validation = _hold_out(name, rest, fraction, "validation_fraction") if fraction else (rest, [])
        return QuestionDomain(name, train, validation, test, notes)
    notes += left_out(f"files of {name} whose names say no split", without_split(path, files), path)
    train, validation, test = ([q for p in of_split[s] for q in read_squad(p)] for s in ("train", "validation", "test"))
    if not validation and validation_fraction:
        train, validation = _hold_out(name, train, validation_fraction, "validation_fraction")
    return QuestionDomain(name, train, validation, test, notes)


def _hold_out(
    name: str, questions: list[Question], fraction: float, setting: str
) -> tuple[list[Question], list[Question]]:
    """The questions about the first contexts, and those about the last ones."""
    contexts = list(dict.fromkeys(q.context for q in questions))
    n = round(fraction * len(contexts))
    if not 0 < n < len(contexts):
        raise ClplatformError(
            f"stream.{setting}={fraction:.2g}: the domain {name!r} has {len(contexts)} contexts, too few to hold some out and "
            "keep some; give it more, a file of its own for the split, or another fraction"
        )
    held = set(contexts[-n:])
    return [q for q in questions if q.context not in held], [q for q in questions if q.context in held]
