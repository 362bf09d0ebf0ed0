"""Who watches a run: the tracker and the terminal. They read, and change nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from clplatform.learner import Learner
from clplatform.results import Results
from clplatform.tracking.logger import TrackingPage
from clplatform.tracking.terminal import TerminalProgress
from clplatform.tracking.tracker import Tracker
from clplatform.types import Experience, ExperienceInfo


class Observers:
    """Tells tracker and terminal how the run goes.

    Args:
        config: resolved; `config["tracking"]` is the tracking page.
        run_dir: the run directory.
        results: the record; of a resumed run with what it holds so far.
        resume: the run goes on where it stopped.
        quiet: say nothing on the terminal.
    """

    def __init__(
        self, config: dict[str, Any], run_dir: Path, results: Results, *, resume: bool = False, quiet: bool = False
    ) -> None:
        stream, metric = results.stream, results.primary_metric
        self.results, self.batch_size = results, config["batch_size"]
        self.tracker = Tracker(
            run_dir,
            config,
            make_page(config["tracking"]),
            run_id=results.run_id,
            resume=resume,
            experience_names=stream["experience_names"],
            metric=metric["name"],
            higher_is_better=metric["higher_is_better"],
            matrix=results.matrix,
        )
        self.terminal = TerminalProgress(
            stream["n_experiences"], stream["class_names"], not quiet, metric=metric["name"]
        )
        self.callbacks: list[pl.Callback] = [self.terminal, _Epochs(self)]
        self._show_finished = resume
        self._experience, self._epoch, self._logged_step = 0, 0, -1

    def start_experience(self, experience: Experience, learner: Learner, epochs: int) -> None:
        if self._show_finished:  # now, not at the start: only what has a checkpoint is really finished
            seconds = [sum(times.values()) for times in self.results.timing[: experience.index]]
            self.terminal.show_finished(self.results.matrix[1 : experience.index + 1], seconds)
        self._show_finished = False
        self._experience = experience.index + 1
        self.terminal.start_experience(experience.info, epochs * -(-len(experience.train) // self.batch_size))

    def finish_experience(self, info: ExperienceInfo | None, results: Results, learner: Learner) -> None:
        index = 0 if info is None else info.index + 1
        row = results.matrix[-1]
        self.tracker.log_experience(index, row, results.metrics, results.matrix, step=learner.steps, epoch=self._epoch)
        if info is not None:
            self.terminal.finish_experience(row)

    def after_batch(self, trainer: pl.Trainer, learner: Learner, batch_idx: int) -> None:
        """Log the loss terms at every n-th optimizer step of the run: a grid that does not move with a resume."""
        step = learner.steps
        if step % self.tracker.every_n_steps or step == self._logged_step or accumulating(trainer, batch_idx):
            return
        self._logged_step = step
        terms: dict[str, Any] = {f"train/{name}": value for name, value in learner.last_terms.items()}
        if trainer.optimizers:
            terms["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.log(trainer, learner, terms)

    def log(self, trainer: pl.Trainer, learner: Learner, metrics: dict[str, Any]) -> None:
        self.tracker.log(
            metrics,
            step=learner.steps,
            experience=self._experience,
            epoch=trainer.current_epoch,
            stage=learner.stage.name,
        )


class _Epochs(pl.Callback):
    """Logs what the learner has measured on the validation split at the end of an epoch."""

    def __init__(self, observers: Observers) -> None:
        self.observers = observers

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        measured = {n: v for n, v in trainer.callback_metrics.items() if n.startswith("validation/")}
        self.observers.log(trainer, pl_module, measured)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.observers._epoch = trainer.current_epoch


def accumulating(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Has this batch only added to the gradients, without a step of the optimizer?"""
    last = batch_idx + 1 >= trainer.num_training_batches
    return not last and (batch_idx + 1) % trainer.accumulate_grad_batches != 0


def make_page(node: dict[str, Any]) -> TrackingPage:
    """The tracking page: the class that `_target_` names, called with the page's other keys."""
    module, _, name = node["_target_"].rpartition(".")
    page = getattr(importlib.import_module(module), name)
    return page(**{key: value for key, value in node.items() if not key.startswith("_")})
