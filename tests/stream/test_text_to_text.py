"""Texts answered with texts: tasks, references, and rows that do not fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clplatform.stream.base import InMemoryStream
from clplatform.stream.text_to_text import text_to_text
from clplatform.types import IGNORED, ClplatformError

OPTIONS: dict[str, Any] = {
    "name": "mine", "train": "train.jsonl", "validation": None, "test": "test.jsonl", "input_key": "input",
    "target_key": "target", "task_key": "task", "tasks": None, "metric": "exact_match", "metric_key": None, "limit": None,
    "scenario": "domain_incremental", "seed": None, "validation_fraction": 0.25, "max_length": 32, "max_target_length": 32,
    "tokenizer_vocab_size": 300, "tokenizer_on": "first",
}  # fmt: skip


def row(task: str, i: int, split: str) -> dict[str, Any]:
    return {"input": f"{task} this: {split} {i}", "target": f"{split} {i} by {task}", "task": task}


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return name


@pytest.fixture(autouse=True)
def _files() -> None:
    for split, n in (("train", 8), ("test", 3)):
        write(f"{split}.jsonl", [row(task, i, split) for i in range(n) for task in ("reverse", "copy", "sort")])


def made(**options: Any) -> InMemoryStream:
    return text_to_text(**OPTIONS | options)


def refusal(**options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        made(**options)
    return str(caught.value)


def pairs(stream: InMemoryStream, data: Any) -> list[Any]:
    return [stream.texts[i] for i in data.fetch(torch.arange(len(data)))["index"].tolist()]


def test_an_experience_for_each_task() -> None:
    stream = made()
    assert [e.name for e in stream] == ["reverse", "copy", "sort"]
    for e in stream:
        assert (len(e.train), len(e.validation or ()), len(e.test)) == (6, 2, 3)
        assert pairs(stream, e.test) == [(r["input"], r["target"]) for r in (row(e.name, i, "test") for i in range(3))]
        trained = {x[0] for d in (e.train, e.validation) for x in pairs(stream, d)}
        assert trained == {row(e.name, i, "train")["input"] for i in range(8)}
        batch = e.train.fetch(torch.arange(6))
        words = [stream.tokenizer.decode(x[x != IGNORED], skip_special_tokens=True) for x in batch["labels"]]
        assert words == [target for _, target in pairs(stream, e.train)]
    assert (stream.info.problem, stream.info.primary_metric) == ("seq2seq", "exact_match")
    for metric in ("rouge_l", "bleu", "chrf"):
        info = made(metric=metric).info
        assert info.primary_metric == metric and info.higher_is_better


def test_rows_are_held_out_for_the_test_where_no_file_has_it() -> None:
    for e in (stream := made(test=None, test_fraction=0.25)):
        parts = [{read for read, _ in pairs(stream, d)} for d in (e.train, e.validation, e.test)]
        assert [len(p) for p in parts] == [4, 2, 2]
        assert set.union(*parts) == {row(e.name, i, "train")["input"] for i in range(8)}
    assert refusal(test=None).startswith("stream.test is missing: give a file, or stream.test_fraction=0.2")
    assert refusal(test_fraction=0.2).startswith("stream.test_fraction holds samples out where there is no stream.test")
    write("train.jsonl", [row("copy", 0, "train")])
    assert refusal(test=None, test_fraction=0.5) == (
        "stream.test_fraction=0.5 of the task 'copy' in train.jsonl leaves no sample to test on: give stream.test"
    )


def test_the_file_may_name_the_metric() -> None:
    rows = [{**row(task, i, "test"), "score": "rouge_l"} for task in ("reverse", "copy", "sort") for i in range(2)]
    write("test.jsonl", rows)
    assert made(metric_key="score").info.primary_metric == "rouge_l"
    write("test.jsonl", [*rows[:2], {**rows[2], "score": "bleu"}, *rows[3:]])
    assert refusal(metric_key="score") == (
        "test.jsonl:3: 'score' is 'bleu' and 'rouge_l' in line 1: a matrix has one metric; give stream.metric and "
        "stream.metric_key=null, or choose stream.tasks that share one"
    )
    assert made(metric_key="score", tasks=["sort"]).info.primary_metric == "rouge_l"
    assert rows[2]["task"] == "copy" and "in line 1" in refusal(metric_key="score", tasks=["reverse", "copy"])
    write("test.jsonl", [{**rows[0], "score": "f3"}, *rows[1:]])
    assert refusal(metric_key="score") == ("test.jsonl:1: 'score' is 'f3', not one of exact_match, rouge_l, bleu, chrf")
    assert "there is no column 'metric'" in refusal(metric_key="metric")


def test_a_validation_file_an_order_and_a_limit() -> None:
    write("val.jsonl", [row(task, i, "val") for task in ("reverse", "sort") for i in range(2)])
    stream = made(validation="val.jsonl", tasks=["sort", "copy"], limit=5)
    assert [e.name for e in stream] == ["sort", "copy"]
    assert [len(e.train) for e in stream] == [5, 5]
    assert stream[1].validation is None and len(stream[0].validation or ()) == 2
    assert stream.notes[:3] == [
        "stream.tasks leaves out 1 of 3 tasks",
        "stream.limit keeps 5 of 8 training rows of sort",
        "stream.limit keeps 5 of 8 training rows of copy",
    ]
    assert not any("keeps" in note for note in made(limit=8).notes)
    assert pairs(stream, stream[0].train)[0][0] == "sort this: train 0"
    assert len({made(seed=seed)[0].name for seed in range(8)}) > 1
    assert [e.task_label for e in made(scenario="task_incremental")] == [0, 1, 2]


def test_without_a_task_key_there_is_one_experience() -> None:
    stream = made(task_key=None)
    assert len(stream) == 1 and stream[0].name == "mine" and len(stream[0].train) == 18


def test_several_references_of_which_the_first_is_trained_on() -> None:
    write("test.jsonl", [{**row("copy", i, "test"), "target": ["first", "second"]} for i in range(2)])
    write(
        "train.jsonl",
        [{**row("copy", i, "train"), "target": [f"mine {i}", "other"] if i else "lone"} for i in range(6)],
    )
    stream = made(validation_fraction=0.0)
    assert [reference for _, reference in pairs(stream, stream[0].test)] == [["first", "second"]] * 2
    batch = stream[0].train.fetch(torch.arange(2))
    words = [stream.tokenizer.decode(x[x != IGNORED], skip_special_tokens=True) for x in batch["labels"]]
    assert words == ["lone", "mine 1"] and pairs(stream, stream[0].train)[0][1] == "lone"
    write("test.jsonl", [{**row("copy", 0, "test"), "target": []}])
    assert refusal() == "test.jsonl:1: 'target' is [], not a text"
    write("test.jsonl", [row("copy", 0, "test"), {**row("copy", 0, "test"), "target": ["a", " "]}])
    assert refusal() == "test.jsonl:2: 'target' is empty"


def test_keys_of_one_s_own_and_other_files() -> None:
    for split in ("train", "test"):
        with Path(f"{split}.csv").open("w", newline="") as file:
            rows = [[f"question {i}", f"answer {i} {split}", i % 2] for i in range(8)]
            csv.writer(file).writerows([["q", "a", "of"], *rows])
    stream = made(train="train.csv", test="test.csv", input_key="q", target_key="a", task_key="of")
    assert [e.name for e in stream] == ["0", "1"]
    assert pairs(stream, stream[1].test)[0] == ("question 1", "answer 1 test")


def test_rows_that_do_not_fit() -> None:
    good = row("copy", 0, "x")
    cases: list[tuple[list[Any], str]] = [
        ([good, {**good, "input": ""}], "bad.jsonl:2: 'input' is empty"),
        ([{**good, "input": 7}], "bad.jsonl:1: 'input' is 7, not a text"),
        ([{**good, "target": None}], "bad.jsonl:1: 'target' is empty"),
        ([{**good, "task": None}], "bad.jsonl:1: 'task' is empty"),
        ([{"input": "a", "target": "b"}], "bad.jsonl:1: there is no column 'task' (there is: 'input', 'target')"),
        ([], "bad.jsonl holds no rows"),
    ]  # fmt: skip
    for rows, message in cases:
        write("bad.jsonl", rows)
        assert refusal(train="bad.jsonl") == message
    Path("bad.jsonl").write_bytes(json.dumps(good).encode() + b"\n\xe9")
    assert refusal(train="bad.jsonl") == "bad.jsonl:2: not UTF-8 (byte 0xe9); save the file in that encoding"


def test_tasks_that_do_not_fit() -> None:
    write("few.jsonl", [row("copy", 0, "test")])
    assert refusal(test="few.jsonl") == "few.jsonl: the task 'reverse' has no rows"
    assert len(made(test="few.jsonl", tasks=["copy"])) == 1
    assert refusal(train="few.jsonl") == "test.jsonl: the task 'reverse' has no training rows in few.jsonl"
    assert refusal(tasks=["swim"]) == "stream.tasks: there is no 'swim' in mine (there is: reverse, copy, sort)"
    assert refusal(test="./train.jsonl") == "./train.jsonl is both the train and the test split: give two"
    assert refusal(train="gone.jsonl") == "there is no file gone.jsonl"


def test_long_texts_are_cut_and_counted() -> None:
    write("train.jsonl", [row(t, i, "train") for t in ("reverse", "copy", "sort") for i in range(8)] + [
        {"input": "word " * 100, "target": "word " * 100, "task": "copy"}])  # fmt: skip
    assert made(tokenizer_vocab_size=600).notes[-2:] == [
        "1 of 34 sources are cut to stream.max_length=32 tokens", "1 of 34 targets are cut to stream.max_target_length=32 tokens",
    ]  # fmt: skip
