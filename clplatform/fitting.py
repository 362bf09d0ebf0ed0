"""Fitting one stage of one experience: a fresh Lightning Trainer, its callbacks, and stopping in the middle."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning.callbacks import EarlyStopping

from clplatform.budget import Allowance, Budget, Spending, counted
from clplatform.checkpoint import AtomicCheckpointIO, StepCheckpoint
from clplatform.data import Loader
from clplatform.learner import Learner
from clplatform.types import Data, Experience, Stage

# Lightning tells with every Trainer which devices there are; a run has one Trainer for each experience.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


class KeepBest(pl.Callback):
    """After early stopping, the weights of the best validation epoch (its state is part of a checkpoint)."""

    def __init__(self, monitor: str, mode: str) -> None:
        self.monitor, self.sign = monitor, 1 if mode == "max" else -1
        self.best, self.weights = -math.inf, {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        if value > self.best:
            self.best = value
            self.weights = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.weights:
            pl_module.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.weights = state_dict["best"], state_dict["weights"]


@dataclass
class Fitter:
    """Trains stages.

    Args:
        trainer: what a Lightning Trainer is made from (`max_epochs`, `precision`, `accelerator`, …).
        batch_size, eval_batch_size: samples in a batch.
        num_workers: processes that load data that does not fit in memory.
        patience: epochs without a better validation accuracy (of language: loss) after which a stage stops; None: never
            stops early.
        bucket: batches of texts of about the same length.
        checkpoint_every, checkpoint_minutes: rhythm of `step.ckpt`; None: not by this.
        callbacks: more Lightning callbacks.
        after_batch: called after every batch, when the strategies are done with it.
        budget: what an experience may use, in place of epochs.
    """

    trainer: dict[str, Any]
    batch_size: int
    eval_batch_size: int
    num_workers: int = 0
    bucket: bool = False
    patience: int | None = None
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    callbacks: list[pl.Callback] = field(default_factory=list)
    after_batch: Callable[[pl.Trainer, Learner, int], None] | None = None
    budget: Budget | None = None

    def make_trainer(self, max_epochs: int | None = None, callbacks: list[pl.Callback] | None = None) -> pl.Trainer:
        """A fresh Trainer: a reused one trains nothing."""
        settings = dict(self.trainer)
        if max_epochs is not None:
            settings["max_epochs"] = max_epochs
        return pl.Trainer(
            **settings,
            logger=False,  # ours logs with one monotonic step over all stages
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=[AtomicCheckpointIO()],
            callbacks=callbacks or [],
        )

    def epochs(self, stage: Stage) -> int:
        return int(self.trainer["max_epochs"] if stage.max_epochs is None else stage.max_epochs)

    def allowances(self, learner: Learner, stages: list[Stage], data: Data) -> list[Allowance | None]:
        """What each stage of an experience may use. To be asked for before a stage's checkpoint is loaded."""
        if self.budget is None:
            return [None] * len(stages)
        sizes = [len(data if stage.data is None else stage.data) for stage in stages]
        planned = [self.epochs(s) * -(-n // self.batch_size) for s, n in zip(stages, sizes, strict=True)]
        return list(self.budget.allowances(counted(learner, self.budget.unit), planned))

    def fit(
        self,
        learner: Learner,
        experience: Experience,
        stage: Stage,
        data: Data,
        *,
        order_seed: int,
        step_path: Path,
        resume_from: Path | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        """Train `stage` on `data`, from the start or from `resume_from` (a `step.ckpt` of this stage), for its epochs or until
        its `allowance` is used."""
        loader = Loader(
            data, self.batch_size, shuffle=True, seed=order_seed, bucket=self.bucket, num_workers=self.num_workers
        )
        callbacks, validation = list(self.callbacks), None
        if self.patience is not None and experience.validation is not None:
            validation = Loader(experience.validation, self.eval_batch_size)
            monitor, mode = (
                ("validation/loss", "min") if learner.info.several_labels else ("validation/accuracy", "max")
            )
            callbacks += [EarlyStopping(monitor, patience=self.patience, mode=mode), KeepBest(monitor, mode)]
        spending = Spending(allowance, self.epochs(stage)) if allowance is not None else None
        max_epochs = stage.max_epochs
        if allowance is not None and spending is not None:
            callbacks.append(spending)
            nothing = allowance.last <= allowance.first or (resume_from is None and allowance.is_used(learner))
            max_epochs = 0 if nothing else -1
        trainer = self.make_trainer(max_epochs, callbacks)
        saver = StepCheckpoint(
            step_path,
            every_n_batches=self.checkpoint_every,
            every_minutes=self.checkpoint_minutes,
            unsaved=learner.chain.unsaved,
        )

        def after_batch(trainer: pl.Trainer, batch_idx: int) -> None:
            if spending is not None:
                spending.after_batch(trainer, learner, batch_idx)
            if self.after_batch is not None:
                self.after_batch(trainer, learner, batch_idx)
            if spending is None or not trainer.should_stop:  # who goes on from there would take one more step
                saver.after_batch(trainer, batch_idx)
            if spending is not None:
                spending.go_on()

        learner.after_batch, learner.stage, learner.stage_epochs = after_batch, stage, trainer.max_epochs or 0
        learner.allowance = allowance
        if allowance is not None:
            learner.stage_epochs = self.epochs(stage)
        learner.train()
        loader = learner.chain.loader(learner, loader)
        learner.stage_steps = n_steps(trainer, len(loader)) if allowance is None else allowance.n_steps
        apart = allowance is not None or stage.trainable is not None  # does what is trained decide what a sample costs?
        if apart:
            learner.counts()
        with trainable(learner, stage.trainable), warnings.catch_warnings():
            # Remarks such as "you defined a validation_step but have no val_dataloader": meant so.
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 with torch 2.15
            trainer.fit(learner, loader, validation, ckpt_path=str(resume_from) if resume_from else None)
            if apart:
                learner.counts()
        learner.to(trainer.strategy.root_device)  # Lightning moves the module to the CPU after a fit


def n_steps(trainer: pl.Trainer, n_batches: int) -> int:
    """Optimizer steps of a whole fit.

    Trainer.estimated_stepping_batches says it too, but asking for it sets up the data before a checkpoint is read,
    and Lightning then never gives the loader its position back: a resumed run would see other batches.
    """
    limit = trainer.limit_train_batches
    n_batches = min(n_batches, int(limit if isinstance(limit, int) else limit * n_batches))
    epochs = trainer.max_epochs or 0
    steps = epochs * -(-n_batches // trainer.accumulate_grad_batches)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


@contextmanager
def trainable(module: torch.nn.Module, pattern: str | None) -> Iterator[None]:
    """Only parameters whose name matches the regular expression are trained inside, and of these not what
    `backbone.freeze` holds; None changes nothing."""
    if pattern is None:
        yield
        return
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    parts = [part for m in module.modules() for part in getattr(m, "frozen", ())]
    fixed = {id(p) for part in parts for p in part.parameters(recurse=False)}
    for name, p in module.named_parameters():
        p.requires_grad_(id(p) not in fixed and re.search(pattern, name) is not None)
    try:
        yield
    finally:
        for name, p in module.named_parameters():
            p.requires_grad_(before.get(name, p.requires_grad))
