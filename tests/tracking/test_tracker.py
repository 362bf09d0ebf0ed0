from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from clplatform.config import check_node
from clplatform.tracking.lightning import Csv, TensorBoard
from clplatform.tracking.local import Local, read
from clplatform.tracking.logger import scalars
from clplatform.tracking.off import Off
from clplatform.tracking.tracker import Tracker


def make(folder: Path, page: Any = None, *, resume: bool = False) -> Tracker:
    return Tracker(folder, {"seed": 0}, page or Local(every_n_steps=5), run_id="id", resume=resume)


def log(tracker: Tracker, step: int, **values: Any) -> None:
    tracker.log(values or {"train/loss": 0.5}, step=step, experience=1, epoch=0, stage="main")


def test_scalars_takes_numbers_and_tensors_in_one_transfer_per_device() -> None:
    mixed = {"a": 1, "b": torch.tensor(0.5), "c": torch.tensor([2]), "d": 0.25, "e": torch.tensor(math.nan)}
    values = scalars(mixed)
    assert list(values) == list(mixed)
    assert [values[k] for k in "abcd"] == [1.0, 0.5, 2.0, 0.25] and math.isnan(values["e"])
    assert all(type(v) is float for v in values.values())
    with pytest.raises(ValueError, match=r"f: only single numbers can be logged, not a tensor of shape \[2\]"):
        scalars({"f": torch.zeros(2)})


def test_scalars_synchronises_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a value was fetched by itself"))
    assert scalars({str(i): torch.tensor(float(i)) for i in range(8)})["7"] == 7.0
    assert len(calls) == 1


def test_an_experience_is_logged_without_empty_cells(tmp_path: Path) -> None:
    matrix: list[list[float | None]] = [[0.1, None], [0.9, None]]
    with make(tmp_path) as tracker:
        tracker.log_experience(0, matrix[0], {"average_accuracy": None}, matrix[:1], step=0)
        log(tracker, 5)
        tracker.log_experience(1, matrix[1], {"average_accuracy": 0.9}, matrix)
    rows = list(read(tmp_path / "metrics.jsonl"))
    assert [(r.step, r.experience, r.stage, r.metrics) for r in rows] == [
        (0, 0, "evaluation", {"evaluation/experience_1": 0.1}),
        (5, 1, "main", {"train/loss": 0.5}),
        (5, 1, "evaluation", {"evaluation/average_accuracy": 0.9, "evaluation/experience_1": 0.9}),
    ]


def test_after_finish_nothing_is_logged(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    log(tracker, 5)
    tracker.finish("completed", {})
    log(tracker, 10)
    tracker.finish("failed", {})
    assert [r.step for r in read(tmp_path / "metrics.jsonl")] == [5]


def test_off_writes_nothing(tmp_path: Path) -> None:
    with make(tmp_path, Off(every_n_steps=1)) as tracker:
        assert tracker.loggers == []
        log(tracker, 5)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "run"
    blocked.write_text("a file where the run directory should be")
    with make(blocked) as tracker:
        log(tracker, 5)
        log(tracker, 10)
    assert capsys.readouterr().err.count("clplatform: LocalLogger failed and logs no more") == 1


@pytest.mark.parametrize("page", ["csv", "tensorboard", "local", "wandb", "off"])
def test_pages_fit_their_classes(page: str) -> None:
    from omegaconf import OmegaConf

    from clplatform.config import conf_dir

    text = (conf_dir() / "tracking" / f"{page}.yaml").read_text()
    assert text.startswith("# ")
    node: Any = OmegaConf.to_container(
        OmegaConf.create({"name": "default", "tracking": OmegaConf.create(text)}), resolve=True
    )
    check_node("tracking", node["tracking"])


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


@pytest.mark.filterwarnings("ignore")  # Lightning's and torch's own remarks
def test_loggers_serve_several_trainers(tmp_path: Path) -> None:
    """Every stage has a fresh Trainer; what is logged through it lands at the run's steps."""

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = self.layer(batch[0]).square().mean()
            self.log("train/own", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    tracker, model = make(tmp_path), Model()
    for stage in range(2):
        tracker.start_stage(first_step=4 * stage, experience=stage + 1, stage="main")
        trainer = pl.Trainer(
            max_epochs=1, logger=tracker.loggers, accelerator="cpu", log_every_n_steps=2, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=1))
    tracker.finish("completed", {})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["experience"]) for r in rows] == [(1, 1), (3, 1), (5, 2), (7, 2)]
    assert all(r["train/own"] > 0 for r in rows)
