from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from rich.console import Console
from world import TinyStream, make_experiment, same, weights

from clplatform.experiment import Experiment
from clplatform.results import Results
from clplatform.strategy.finetuning import Finetuning
from clplatform.tracking.local import read
from clplatform.tracking.logger import Row
from clplatform.tracking.observe import Observers, make_page

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's and torch's own remarks

LOCAL = {"_target_": "clplatform.tracking.local.Local", "every_n_steps": 3}


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.steps == self.step:  # type: ignore[attr-defined]
            raise RuntimeError("stop")


def watched(run_dir: Path, *, resume: bool = False, stop_at: int | None = None, page: Any = LOCAL) -> Experiment:
    stream = TinyStream()
    experiment = make_experiment(
        run_dir, {"finetuning": Finetuning()}, stream=stream, fitter={"checkpoint_every": 2, "patience": 5}
    )
    if resume:
        experiment.results = Results.load(run_dir)
    experiment.results.stream["class_names"] = list(stream.info.class_names)
    observers = Observers({"batch_size": 8, "tracking": page, "seed": 0}, run_dir, experiment.results, resume=resume)
    observers.terminal.console = Console(file=io.StringIO())
    experiment.observers.append(observers)
    experiment.fitter.after_batch, experiment.fitter.callbacks = observers.after_batch, [*observers.callbacks]
    if stop_at is not None:
        experiment.fitter.callbacks.append(StopAt(stop_at))
    return experiment


def run(experiment: Experiment, *, resume: bool = False) -> None:
    observers: Any = experiment.observers[0]
    experiment.results.save(experiment.run_dir)
    with observers.tracker, observers.terminal:
        experiment.run(resume=resume)
        observers.tracker.finish("completed", experiment.results.metrics)


def content(run_dir: Path) -> list[tuple[Any, ...]]:
    def plain(r: Row) -> tuple[Any, ...]:
        return r.step, r.experience, r.epoch, r.stage, r.metrics

    return [plain(r) for r in read(run_dir / "metrics.jsonl")]


def test_a_run_is_logged_from_its_start_to_its_end(tmp_path: Path) -> None:
    experiment = watched(tmp_path)
    run(experiment)
    rows = list(read(tmp_path / "metrics.jsonl"))
    train = [r for r in rows if "train/loss" in r.metrics]
    assert [r.step for r in train] == list(range(3, 25, 3))  # 3 experiences × 2 epochs × 4 batches
    assert [r.experience for r in train] == [1, 1, 2, 2, 2, 3, 3, 3]
    assert all({"train/loss", "train/task", "train/lr"} == set(r.metrics) for r in train)
    assert [r.step for r in rows if "validation/accuracy" in r.metrics] == [4, 8, 12, 16, 20, 24]
    evaluations = [r for r in rows if r.stage == "evaluation"]
    assert [(r.step, r.experience) for r in evaluations] == [(0, 0), (8, 1), (16, 2), (24, 3)]
    last = evaluations[-1].metrics
    final = experiment.results.matrix[-1]
    assert [last[f"evaluation/experience_{j}"] for j in (1, 2, 3)] == final
    assert last["evaluation/average_accuracy"] == pytest.approx(sum(v for v in final if v is not None) / 3)
    assert sorted(r.step for r in rows) == [r.step for r in rows]
    terminal: Any = experiment.observers[0]
    assert len(terminal.terminal.console.file.getvalue().splitlines()) == 3


@pytest.mark.parametrize("stop_at", [1, 6, 8, 11, 16, 23])
def test_a_broken_and_resumed_run_has_the_same_record(tmp_path: Path, stop_at: int) -> None:
    run(whole := watched(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="stop"):
        run(watched(tmp_path / "broken", stop_at=stop_at))
    run(resumed := watched(tmp_path / "broken", resume=True), resume=True)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")
    observers: Any = resumed.observers[0]
    lines = observers.terminal.console.file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/3", "2/3", "3/3"]  # those from before it stopped, too
    assert same(weights(resumed.learner), weights(whole.learner))


def test_logging_changes_nothing_in_the_run(tmp_path: Path) -> None:
    rare, every = {**LOCAL, "every_n_steps": 1000}, {**LOCAL, "every_n_steps": 1}
    run(a := watched(tmp_path / "a", page=rare))
    run(b := watched(tmp_path / "b", page=every))
    assert same(weights(a.learner), weights(b.learner))
    assert a.results.matrix == b.results.matrix
    counts = [sum("train/loss" in r.metrics for r in read(tmp_path / name / "metrics.jsonl")) for name in "ab"]
    assert counts == [0, 24]
    with (tmp_path / "b" / "accuracy_matrix.csv").open() as file:
        assert len(list(csv.reader(file))) == 5


def test_accumulated_batches_are_logged_once_a_step(tmp_path: Path) -> None:
    experiment = watched(tmp_path, page={**LOCAL, "every_n_steps": 1})
    experiment.fitter.trainer["accumulate_grad_batches"] = 3
    run(experiment)
    train = [r for r in read(tmp_path / "metrics.jsonl") if "train/loss" in r.metrics]
    assert [r.step for r in train] == list(range(1, 13))  # of 4 batches: one step of 3, one of the last


def test_a_batch_that_is_not_logged_reads_nothing(tmp_path: Path) -> None:
    experiment = watched(tmp_path, page={**LOCAL, "every_n_steps": 1000})
    observers: Any = experiment.observers[0]

    class Step:
        steps = 7

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was read")

    observers.after_batch(None, Step(), 0)


def test_a_page_is_made_by_its_target() -> None:
    page = make_page({"_target_": "clplatform.tracking.lightning.Csv", "every_n_steps": 7})
    assert type(page).__name__ == "Csv" and page.every_n_steps == 7
