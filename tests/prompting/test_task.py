"""Prompts as they are written, and settings and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clplatform.config import identity
from clplatform.prompting.task import PromptedTask, check_tasks
from clplatform.types import ClplatformError

WORDS = {"pos": "good", "neg": "bad"}


def task(**changes: Any) -> PromptedTask:
    settings = {"name": "mood", "test": "t.csv", "template": "Review: {text}\nMood: {label}", "verbalisers": WORDS}
    return PromptedTask(**{**settings, **changes})


def table(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(path)


def test_spaces_at_the_end_go_with_the_words() -> None:
    assert task().choices("so so", "") == ("Review: so so\nMood:", [" good", " bad"])
    assert task(template="{text}\n{label}").choices("a", "X\n\n") == ("X\n\na\n", ["good", "bad"])


def test_examples_are_drawn_by_the_seed_and_stand_with_their_labels(tmp_path: Path) -> None:
    rows = [(f"text {i}", "pos" if i % 2 else "neg") for i in range(20)]
    path = table(tmp_path / "train.csv", *rows)
    known = {f"Review: {text}\nMood: {WORDS[label]}" for text, label in rows}
    found = [task(train=path, shots=4, seed=seed).examples() for seed in (0, 0, 1)]
    parts = found[0].split("\n\n")
    assert parts.pop() == "" and len(set(parts)) == 4 and set(parts) <= known
    assert found[0] == found[1] != found[2]
    assert task().examples() == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{label}: {text}"}, "it needs {text} once, and {label} once, at its end"),
        ({"template": "Mood: {label}"}, "it needs {text} once"),
        ({"verbalisers": {"pos": "good"}}, "give two labels or more, each with words of its own"),
        ({"verbalisers": {"pos": "good", "neg": "good"}}, "each with words of its own"),
        ({"shots": 2}, "examples are drawn from prompting.mood.train, which is missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClplatformError) as error:
        task(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "name one task or more"),
        ({"mood": "a.csv"}, "prompting.mood: give the task its settings"),
        ({"mood": {"test": "a.csv", "template": "{text} {label}"}}, "prompting.mood.verbalisers is missing"),
        ({"mood": {"test": "a.csv", "template": "{text} {label}", "verbalisers": WORDS, "shot": 1}},
         "prompting.mood.shot: there is no such setting; did you mean shots?"),
        ({"mood": {"test": "a.csv", "template": "{text} {label}", "verbalisers": WORDS, "shots": -1}},
         "prompting.mood.shots=-1: input should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_wrong_is_refused(tasks: Any, message: str) -> None:
    with pytest.raises(ClplatformError) as error:
        check_tasks(tasks)
    assert message in str(error.value)


def test_files_are_refused_with_the_line(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", ("fine", "pos"), ("odd", "meh"))
    with pytest.raises(
        ClplatformError, match=r"t\.csv:3: the label 'meh' has no words in prompting\.mood\.verbalisers"
    ):
        task().read(path)
    few = table(tmp_path / "few.csv", ("fine", "pos"))
    with pytest.raises(ClplatformError, match=r"prompting\.mood\.shots=2: .*few\.csv has 1 rows"):
        task(train=few, shots=2).examples()
    numbers = table(tmp_path / "n.csv", ("fine", "1"))
    assert task(verbalisers={"1": "good", "0": "bad"}).read(numbers) == (["fine"], ["1"])


def test_without_it_a_job_is_who_it_was() -> None:
    plain = {"seed": 0, "stream": {"name": "x"}}
    asked = {**plain, "prompting": {"mood": {"test": "a.csv"}}}
    assert identity(plain) == identity({**plain, "prompting": None}) != identity(asked)
