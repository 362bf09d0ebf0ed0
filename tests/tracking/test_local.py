from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest

from clplatform.tracking import local as module
from clplatform.tracking.local import Local, LocalLogger, read
from clplatform.tracking.logger import EVALUATION, Row, RunContext
from clplatform.tracking.tracker import Tracker


def context(folder: Path, *, resume: bool = False) -> RunContext:
    return RunContext(folder, {}, "id", resume)


def row(step: int, value: float = 0.5, *, experience: int = 1, stage: str = "main", name: str = "train/loss") -> Row:
    return Row(step, experience, 0, stage, {name: value})


def write(folder: Path, rows: list[Row], *, resume: bool = False, close: bool = True) -> LocalLogger:
    logger = LocalLogger(context(folder, resume=resume))
    for r in rows:
        logger.write(r)
    if close:
        logger.close("completed", {})
    return logger


def steps(folder: Path) -> list[int]:
    return [r.step for r in read(folder / "metrics.jsonl")]


def test_one_json_object_per_line_with_place_and_metrics(tmp_path: Path) -> None:
    write(tmp_path, [row(10, 0.25), row(20, 0.125)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["time", "step", "experience", "epoch", "stage", "train/loss"]] * 2
    assert [line["train/loss"] for line in lines] == [0.25, 0.125]
    assert lines[0]["time"] > 1.6e9


def test_lines_are_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    logger = write(tmp_path, [row(1), row(2)], close=False)
    assert steps(tmp_path) == [1, 2]
    logger.close("failed", {})


def test_numbers_that_json_lacks_are_null_and_named_beside(tmp_path: Path) -> None:
    write(tmp_path, [row(1, math.nan), row(2, math.inf), row(3, -math.inf), row(4)])
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["train/loss"] for line in lines] == [None, None, None, 0.5]
    assert [line.get("non_finite") for line in lines] == [
        {"train/loss": "NaN"}, {"train/loss": "Infinity"}, {"train/loss": "-Infinity"}, None,
    ]  # fmt: skip
    rows = list(read(tmp_path / "metrics.jsonl"))
    assert math.isnan(rows[0].metrics["train/loss"])
    assert [r.metrics["train/loss"] for r in rows[1:]] == [math.inf, -math.inf, 0.5]
    write(tmp_path, [row(4)], resume=True)  # the rewrite keeps them
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:3] == text.splitlines()[:3]


def test_a_resumed_run_drops_the_rows_that_it_logs_again(tmp_path: Path) -> None:
    write(tmp_path, [row(10), row(20), row(30), row(40)])
    write(tmp_path, [row(30, 0.1), row(40, 0.2)], resume=True)
    rows = list(read(tmp_path / "metrics.jsonl"))
    assert [(r.step, r.metrics["train/loss"]) for r in rows] == [(10, 0.5), (20, 0.5), (30, 0.1), (40, 0.2)]


def test_a_resume_between_experiences_keeps_the_evaluation_at_the_same_step(tmp_path: Path) -> None:
    evaluation = row(20, stage=EVALUATION, name="evaluation/average_accuracy")
    write(tmp_path, [row(10), row(20), evaluation, row(30, experience=2)])
    write(tmp_path, [row(30, experience=2)], resume=True)
    assert steps(tmp_path) == [10, 20, 20, 30]
    # Stopped between the last step and the evaluation: the training row of that step stays.
    write(tmp_path, [evaluation, row(30, experience=2)], resume=True)
    assert [(r.step, r.stage) for r in read(tmp_path / "metrics.jsonl")] == [
        (10, "main"), (20, "main"), (20, EVALUATION), (30, "main"),
    ]  # fmt: skip


def test_a_run_that_starts_over_or_goes_on_in_its_first_experience_evaluates_the_start_once(tmp_path: Path) -> None:
    start = row(0, experience=0, stage=EVALUATION)
    write(tmp_path, [start, row(10), row(20), row(30)])
    write(tmp_path, [start, row(30, 0.25)], resume=True)
    assert steps(tmp_path) == [0, 10, 20, 30]
    write(tmp_path, [start, row(10, 0.25)], resume=True)
    assert steps(tmp_path) == [0, 10]


def test_a_torn_last_line_is_dropped_but_a_broken_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [row(10), row(20)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-12])
    assert steps(tmp_path) == [10]
    write(tmp_path, [row(20)], resume=True)
    assert steps(tmp_path) == [10, 20]
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not JSON"):
        list(read(path))


def test_resuming_that_logs_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    write(tmp_path, [row(10)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, [], resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_lightning_steps_become_steps_of_the_run(tmp_path: Path) -> None:
    logger = LocalLogger(context(tmp_path))
    for first in (0, 100):
        logger.start_stage(first_step=first, experience=first // 100 + 1, stage="main")
        logger.log_metrics({"lr-AdamW": 0.1, "epoch": 2}, 7)
    logger.close("completed", {})
    rows = list(read(tmp_path / "metrics.jsonl"))
    assert [(r.step, r.experience, r.epoch, r.metrics) for r in rows] == [
        (7, 1, 2, {"lr-AdamW": 0.1}),
        (107, 2, 2, {"lr-AdamW": 0.1}),
    ]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12: the child only writes a file
def test_a_killed_process_leaves_every_finished_line(tmp_path: Path) -> None:
    """In a forked child, so that no import is paid again."""
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            write(tmp_path, [row(i) for i in range(50)], close=False)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert steps(tmp_path) == list(range(50))


def test_neither_wandb_nor_hydra_is_imported_where_it_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wandb", "hydra", "hydra.utils"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    for source in Path(module.__file__).parent.glob("*.py"):
        spec = importlib.util.spec_from_file_location(f"fresh_{source.stem}", source)
        assert spec is not None and spec.loader is not None
        fresh = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, fresh)
        spec.loader.exec_module(fresh)
    with Tracker(tmp_path, {}, Local(every_n_steps=1), run_id="a") as tracker:
        tracker.log({"train/loss": 1.0}, step=1, experience=1, epoch=0, stage="main")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "metrics.jsonl").exists()
