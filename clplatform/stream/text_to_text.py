"""Any task that answers a text with a text: instructions, summaries, dialogue, from JSONL, CSV or Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from annotated_types import Gt, Lt

from clplatform.stream.base import InMemoryStream, check_one_test, split_test
from clplatform.stream.language import choose
from clplatform.stream.notes import limited
from clplatform.stream.tables import Table, read_table
from clplatform.stream.text_files import check_text
from clplatform.stream.text_pairs import (
    Fraction,
    Limit,
    MaxLength,
    Metric,
    Pairs,
    PairScenario,
    Part,
    Reference,
    Seed,
    TokenizerOn,
    VocabSize,
    pair_stream,
)
from clplatform.types import ClplatformError


def text_to_text(
    *, name: str, train: str, validation: str | None, test: str | None, input_key: str, target_key: str, task_key: str | None,
    tasks: list[str] | None, metric: Metric, limit: Limit, scenario: PairScenario, seed: Seed,
    validation_fraction: Fraction, max_length: MaxLength, max_target_length: MaxLength,
    tokenizer_vocab_size: VocabSize, tokenizer_on: TokenizerOn, tokenizer: Any = None,
    metric_key: str | None = None, test_fraction: Annotated[float, Gt(0), Lt(1)] | None = None,
) -> InMemoryStream:  # fmt: skip
    """Pairs of input and target, an experience for each task.

    Args:
        target_key: a text, or a list of them: the first is trained on, all of them are references.
        task_key: names the experience of a row; None: there is one experience.
        tasks: the tasks in the order of the experiences; None: all, in the order of their first rows, or shuffled by
            `seed`.
        metric_key: names the metric in the test rows of these tasks, all of which have the same; None: it is `metric`.
        limit: training rows of a task at most: the first.
        validation_fraction: of each task's training rows, at random, if there is no validation file.
        test_fraction: the same for the test.
        tokenizer: of the pretrained backbone, given by the platform; None: one is trained.

    Raises:
        ClplatformError: a file is missing or malformed, or lacks a key; with the line. A task has no test rows, or no
            training rows.
    """
    check_one_test(test, test_fraction)
    files = {"train": train, "validation": validation, "test": test}
    _check_different(files)
    by_task = {s: read_tasks(f, input_key, target_key, task_key, name) for s, f in files.items() if f}
    known = list(by_task["train"])
    if test is None:
        by_task["train"], by_task["test"] = _hold_out_test(by_task["train"], test_fraction, seed, train)
    for split, found in by_task.items():
        if wrong := [task for task in found if task not in known]:
            raise ClplatformError(f"{files[split]}: the task {wrong[0]!r} has no training rows in {train}")
    parts, chosen = [], choose(known, tasks, seed, name, key="tasks")
    left_out = len(known) - len(chosen)
    notes = [f"stream.tasks leaves out {left_out} of {len(known)} tasks"] if left_out else []
    for task in chosen:
        if task not in by_task["test"]:
            raise ClplatformError(f"{test}: the task {task!r} has no rows")
        there = by_task["train"][task]
        first = there.select(range(len(there))[:limit])
        notes += limited("limit", len(first), len(there), f"training rows of {task}")
        held = by_task.get("validation", {}).get(task)
        parts.append(Part(task, first, held, by_task["test"][task]))
    if metric_key is not None:
        metric = named_metric(test or train, metric_key, task_key, chosen)
    return pair_stream(
        name, parts, metric=metric, scenario=scenario, seed=seed,
        validation_fraction=0.0 if validation else validation_fraction, max_length=max_length,
        max_target_length=max_target_length, vocab_size=tokenizer_vocab_size, on=tokenizer_on, tokenizer=tokenizer,
        notes=notes,
    )  # fmt: skip


def _hold_out_test(
    tasks: dict[str, Pairs], fraction: float | None, seed: int | None, path: str
) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """What is trained on, and what is tested on: a fraction of each task's rows."""
    kept, held = {}, {}
    for task, pairs in tasks.items():
        own, out = split_test(
            torch.zeros(len(pairs), dtype=torch.int64), fraction, seed, f"the task {task!r} in {path}"
        )
        kept[task], held[task] = pairs.select(own.tolist()), pairs.select(out.tolist())
    return kept, held


def named_metric(path: str, key: str, task_key: str | None, tasks: list[str]) -> Any:
    """The metric that all rows of these tasks name.

    Raises:
        ClplatformError: there is no such metric, or there are several; with the line.
    """
    table, there = read_table(path, [key, *([task_key] if task_key else [])]), get_args(Metric)
    mine = [i for i in range(len(table.lines)) if task_key is None or _task(table, task_key, i) in tasks]
    for i in mine:
        if (value := table.columns[key][i]) not in there:
            raise ClplatformError(f"{_where(table, i)}: {key!r} is {value!r}, not one of {', '.join(there)}")
        if value != (first := table.columns[key][mine[0]]):
            raise ClplatformError(
                f"{_where(table, i)}: {key!r} is {value!r} and {first!r} in line {table.lines[mine[0]]}: a matrix has one "
                "metric; give stream.metric and stream.metric_key=null, or choose stream.tasks that share one"
            )
    return table.columns[key][mine[0]]


def _check_different(files: dict[str, str | None]) -> None:
    seen: dict[Path, str] = {}
    for split, path in files.items():
        if path is None:
            continue
        resolved = Path(path).expanduser().resolve()
        if resolved in seen:
            raise ClplatformError(f"{path} is both the {seen[resolved]} and the {split} split: give two")
        seen[resolved] = split


def read_tasks(path: str, input_key: str, target_key: str, task_key: str | None, default: str) -> dict[str, Pairs]:
    """The pairs of each task, in the order of their first rows.

    Args:
        default: the task's name, if there is no `task_key`.
    """
    table = read_table(path, [input_key, target_key, *([task_key] if task_key else [])])
    if not table.lines:
        raise ClplatformError(f"{path} holds no rows")
    found: dict[str, Pairs] = {}
    for i in range(len(table.lines)):
        task = _task(table, task_key, i) if task_key else default
        pairs = found.setdefault(task, Pairs([], []))
        source = table.columns[input_key][i]
        check_text(_where(table, i), f"{input_key!r}", source)
        pairs.sources.append(source)
        pairs.references.append(_reference(table, target_key, i))
    return found


def _where(table: Table, i: int) -> str:
    return f"{table.path}:{table.lines[i]}"


def _task(table: Table, key: str, i: int) -> str:
    value = table.columns[key][i]
    value = str(value) if isinstance(value, int) else value
    check_text(_where(table, i), f"{key!r}", value)
    return value


def _reference(table: Table, key: str, i: int) -> Reference:
    """A text, or a list of at least one."""
    value = table.columns[key][i]
    for text in value if isinstance(value, list) and value else [value]:
        check_text(_where(table, i), f"{key!r}", text)
    return value
