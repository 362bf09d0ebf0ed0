from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from clplatform.config import check_node
from clplatform.tracking.local import Local, read
from clplatform.tracking.tracker import Tracker


def make(folder: Path, page: Any = None, *, resume: bool = False) -> Tracker:
    return Tracker(folder, {"seed": 0}, page or Local(every_n_steps=5), run_id="id", resume=resume)


def log(tracker: Tracker, step: int, **values: Any) -> None:
    tracker.log(values or {"train/loss": 0.5}, step=step, experience=1, epoch=0, stage="main")


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


def test_a_disk_that_fails_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "run"
    blocked.write_text("a file where the run directory should be")
    with make(blocked) as tracker:
        log(tracker, 5)
        log(tracker, 10)
    assert capsys.readouterr().err.count("clplatform: LocalLogger failed and logs no more") == 1


@pytest.mark.parametrize("page", ["csv", "tensorboard", "local", "wandb"])
def test_pages_fit_their_classes(page: str) -> None:
    from omegaconf import OmegaConf

    from clplatform.config import conf_dir

    text = (conf_dir() / "tracking" / f"{page}.yaml").read_text()
    assert text.startswith("# ")
    node: Any = OmegaConf.to_container(
        OmegaConf.create({"name": "default", "tracking": OmegaConf.create(text)}), resolve=True
    )
    check_node("tracking", node["tracking"])


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
