from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from clplatform.tracking.lightning import Csv, TensorBoard
from clplatform.tracking.local import read
from clplatform.tracking.tracker import Tracker
from clplatform.types import ClplatformError


def make(folder: Path, page: Any, *, resume: bool = False) -> Tracker:
    return Tracker(folder, {"seed": 0}, page, run_id="id", resume=resume)


def log(tracker: Tracker, step: int, **values: Any) -> None:
    tracker.log(values or {"train/loss": 0.5}, step=step, experience=1, epoch=0, stage="main")


def test_csv_has_the_rows_and_a_resume_keeps_the_old_file(tmp_path: Path) -> None:
    for resume, step in ((False, 5), (True, 10)):
        with make(tmp_path, Csv(every_n_steps=5), resume=resume) as tracker:
            log(tracker, step)
    for version, step in (("version_0", "5"), ("version_1", "10")):
        header, values = (tmp_path / "csv" / version / "metrics.csv").read_text().splitlines()
        row = dict(zip(header.split(","), values.split(","), strict=True))
        assert (row["step"], row["train/loss"], float(row["experience"])) == (step, "0.5", 1.0)


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with make(tmp_path, TensorBoard(every_n_steps=5)) as tracker:
        log(tracker, 5)
        log(tracker, 10, **{"train/loss": 0.25})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 0.5), (10, 0.25)]


def test_a_resumed_tensorboard_run_replaces_what_it_logs_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with make(tmp_path, TensorBoard(every_n_steps=5)) as tracker:
        log(tracker, 5)
        log(tracker, 10)
    with make(tmp_path, TensorBoard(every_n_steps=5), resume=True) as tracker:
        log(tracker, 10, **{"train/loss": 0.25})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 0.5), (10, 0.25)]


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClplatformError, match=r"tracking=tensorboard needs the package tensorboard: install it"):
        TensorBoard(every_n_steps=5)


def test_every_page_keeps_the_record_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for page in (Csv(every_n_steps=5), TensorBoard(every_n_steps=5)):
        with make(tmp_path / type(page).__name__, page) as tracker:
            log(tracker, 5)
        assert [r.step for r in read(tmp_path / type(page).__name__ / "metrics.jsonl")] == [5]
