"""The LightningModule that trains one stage of one experience. It knows no tasks and no strategy's name.

The step, in order: rows are added (replay), the batch is augmented, the model runs (strategies may wrap
it), the task's loss and the strategies' terms are summed; Lightning does the rest (precision, accumulation,
clipping, devices), and gradients are edited after unscaling and before clipping.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.budget import Allowance
from clplatform.data import Loader, by_length
from clplatform.head.span import close_places
from clplatform.head.vocabulary import answer
from clplatform.loss import cross_entropy
from clplatform.memory.features import KeptFeatures
from clplatform.metric.flops import FlopMeter
from clplatform.module.mode import eval_mode
from clplatform.random_state import random_state, set_random_state
from clplatform.strategy.base import Chain, Strategy
from clplatform.teacher import Teacher
from clplatform.types import IGNORED, MASKED, Batch, Data, Experience, ExperienceInfo, Output, Stage, StreamInfo

# Steps of a schedule in a stage whose number of steps is not known: it goes through them by what is used.
FINE = 1_000_000


class Learner(pl.LightningModule):
    """A backbone with a head, and the strategies that decide how it learns.

    Args:
        backbone: batch → features [B, D].
        make_head: makes an empty head: features [B, D], task_labels [B] → logits [B, K].
        chain: the strategies.
        info: the stream's metadata.
        optimizer: parameter groups → optimizer.
        schedule: (optimizer, number of steps) → learning-rate scheduler stepped once a step, or None.
        augment: (batch, generator) → batch, applied to training batches; None: nothing.
        label_smoothing: of the cross-entropy, 0 … 1.
        batch_size: of the passes that strategies make over data (`batches`).
    """

    # `Any`: a module's attributes are unknown to a type checker (see the protocols Backbone and Head).
    backbone: Any
    head: Any
    # What strategies may add: trainable parts of their own, saved and moved with the model.
    extras: nn.ModuleDict

    def __init__(
        self,
        *,
        backbone: nn.Module,
        make_head: Callable[[], nn.Module],
        chain: Chain,
        info: StreamInfo,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None,
        augment: Callable[[Batch, torch.Generator], Batch] | None = None,
        label_smoothing: float = 0.0,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.extras = backbone, make_head(), nn.ModuleDict()
        self.make_head = make_head
        self.chain, self.info = chain, info
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.augmentation, self.label_smoothing, self.batch_size = augment, label_smoothing, batch_size
        self.seen: list[ExperienceInfo] = []
        self.experience: Experience | None = None
        self.stage = Stage()
        self.generator = torch.Generator()  # for the strategies' random choices: never the global one
        self.last_terms: dict[str, Tensor] = {}  # detached loss terms of the last batch
        self.position: tuple[int, int] = (0, 0)  # experience, stage: stored with a checkpoint
        self.stage_epochs = 0  # epochs that the current stage may take
        self.stage_steps = 0  # optimizer steps that the current stage will take
        self.steps = 0  # optimizer steps of the whole run
        self.samples = 0  # samples of the whole run that a training step has seen, replayed ones included
        self.trained = 0  # parameters that an optimizer of the run was given at most
        self.seconds = 0.0  # of training steps of the whole run, where a budget counts them
        self.allowance: Allowance | None = None  # what the current stage may use, if experiences have a budget
        self.flops = FlopMeter()
        self.flops.watch(backbone)
        self.precision_context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        # [T, K]: classes of each task, where task ids may be used; grown with the structure
        self.register_buffer("classes_of_task", torch.zeros(0, 0, dtype=torch.bool), persistent=False)
        self.after_batch: Callable[[pl.Trainer, int], None] | None = None  # logging and checkpoints
        self.past: list[Data] = []  # earlier training data: filled only for strategies that need `past_data`
        self._last: tuple[Batch, Output] | None = None
        self._kept = KeptFeatures(backbone)
        self._pending_rng: dict[str, Any] | None = None

    # -- structure -------------------------------------------------------------------------------------------
    def build(self, info: ExperienceInfo) -> None:
        """Give the model the structure this experience needs: from metadata only, and idempotent."""
        self.seen = [*[e for e in self.seen if e.index < info.index], info]
        self.head.grow(info)
        if self.info.task_ids:
            n_tasks = 1 + max(e.task_label for e in self.seen)  # a task may come back
            known = torch.zeros(n_tasks, info.n_seen_classes, dtype=torch.bool)
            for e in self.seen:
                known[e.task_label, list(e.classes)] = True
            self.classes_of_task = known.to(self.device)
        self.chain.build(self, info)

    def fresh_head(self) -> nn.Module:
        """A newly initialised head for the classes seen so far."""
        head: Any = self.make_head()
        for info in self.seen:
            head.grow(info)
        return head.to(self.device)

    @property
    def n_classes(self) -> int:
        """Classes seen so far, the current experience's included."""
        return self.seen[-1].n_seen_classes if self.seen else 0

    @property
    def n_old_classes(self) -> int:
        """Classes seen before the current experience."""
        return self.seen[-2].n_seen_classes if len(self.seen) > 1 else 0

    def source_of(self, strategy: Strategy) -> int:
        """The number (1, 2, …) that marks rows which this strategy adds to a batch."""
        return 1 + list(self.chain).index(strategy)

    # -- the model -------------------------------------------------------------------------------------------
    def forward(self, batch: Batch) -> Output:
        """The model as its strategies wrap it. Logits [B, K] over the classes seen, features [B, D]."""
        return self.chain.forward(self, batch, self.run)

    def run(self, batch: Batch) -> Output:
        """The bare model: backbone, head, and the task's mask where task ids may be used. A strategy that has frozen the
        backbone and knows its `features` [B, D] puts them into the batch."""
        features = batch["features"] if "features" in batch else self.backbone(batch)
        return Output(close_places(batch, self.classify(features, batch["task_labels"])), features)

    def frozen_features(self, batch: Batch) -> Tensor:
        """Features [B, D] of the bare backbone, for strategies that have frozen it for good: of data that are evaluated
        after every experience they are computed once."""
        return self._kept(self.backbone, batch)

    def with_frozen_features(self, batch: Batch, run: Callable[[Batch], Output]) -> Batch:
        """The batch with its `frozen_features`; as it is where they are there already, or another strategy stands before the
        model (`run`, as `forward` of a strategy gets it)."""
        if "features" in batch or run != self.run:
            return batch
        return {**batch, "features": self.frozen_features(batch)}

    def classify(self, features: Tensor, task_labels: Tensor) -> Tensor:
        """Features [B, D], task_labels [B] → logits [B, K]."""
        return self.mask_tasks(answer(self.backbone, self.head, features, task_labels), task_labels)

    @torch.no_grad()
    def generate(self, batch: Batch, search: Any = None) -> Tensor:
        """What the model writes for each sample of a batch, int64 [B, T] as `Backbone.generate` has it.

        Args:
            search: how (`clplatform.backbone.search.Search`); None: as the backbone's page says.
        """
        write = self.write if search is None else partial(self.write, search=search)
        tokens = self.chain.forward(self, batch, write).tokens
        assert tokens is not None, "a strategy's forward must hand on what `run` gives"
        return tokens

    def write(self, batch: Batch, **how: Any) -> Output:
        """The bare model as a writer: in place of `run` where the strategies wrap generation."""
        tokens = self.backbone.generate(batch, **how)
        nothing = tokens.new_zeros((len(tokens), 0), dtype=torch.float32)
        return Output(nothing, nothing, tokens)

    def mask_tasks(self, logits: Tensor, task_labels: Tensor) -> Tensor:
        """Logits [B, K] (of tokens [B, T, K]) with those of classes outside a sample's task at `MASKED`, if task ids may be
        used."""
        if not self.info.task_ids or not self.info.has_classes:
            return logits
        allowed = self.classes_of_task[task_labels, : logits.shape[-1]]
        if allowed.shape[1] < logits.shape[-1]:
            allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[1]))
        return logits.masked_fill(~(allowed if logits.ndim == 2 else allowed[:, None]), MASKED)

    def snapshot(self) -> Teacher:
        """The model as it is now."""
        return Teacher(self)

    def task_loss(self, batch: Batch, output: Output, reduction: str = "mean") -> Tensor:
        """Cross-entropy over the classes seen so far; `reduction` as in PyTorch ("none": [B]).

        Where every token is predicted, the mean is over all tokens of the batch, and a sample's own loss is the sum over
        its tokens: −log p of all that it should say.
        """
        over_allowed = not self.info.predicts_text and (self.info.task_ids or not self.info.has_classes)
        return cross_entropy(output.logits, batch["labels"], self.label_smoothing, reduction, over_allowed=over_allowed)

    # -- data --------------------------------------------------------------------------------------------------
    def batches(self, data: Data, *, augment: bool = False, batch_size: int | None = None) -> Iterator[Batch]:
        """All of `data` in order, on the model's device."""
        for batch in Loader(data, batch_size or self.batch_size):
            batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            yield self.augment(batch) if augment else batch

    def evaluation_batches(self, data: Data, batch_size: int) -> Iterator[Batch]:
        """All of `data`, texts from the shortest to the longest: the batches of which `frozen_features` are kept."""
        batches = self.batches(by_length(data)[0], batch_size=batch_size)
        with self._kept.of(data) as at:
            for number, batch in enumerate(batches):
                at(number)
                yield batch

    @torch.no_grad()
    def features(self, data: Data) -> Tensor:
        """Features [N, D] (float32 at least) of all of `data`, not augmented, of the model in eval mode."""
        data, back = by_length(data)
        with eval_mode(self), self.precision_context():
            found = [self(batch).features for batch in self.batches(data)]
        size: Any = self.backbone.feature_size
        features = torch.cat(found)[back.to(self.device)] if found else torch.zeros(0, size, device=self.device)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def augment(self, batch: Batch) -> Batch:
        """The batch with random augmentation; what was there before stays under `raw_…`, for buffers."""
        if self.augmentation is None:
            return batch
        changed = self.augmentation(batch, self.generator)
        raw = {f"raw_{name}": batch[name] for name in changed if changed[name] is not batch[name]}
        return {**changed, **raw}

    # -- the step ----------------------------------------------------------------------------------------------
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = self.augment(self.chain.extend_batch(self, batch))
        output = self(batch)
        task = self.chain.task_loss(self, batch, output)
        if task is None:
            task = self.task_loss(batch, output)
        terms = {"task": task, **self.chain.loss(self, batch, output)}
        loss = task if len(terms) == 1 else torch.stack([*terms.values()]).sum()
        self.last_terms = {"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}}
        self._last = batch, Output(output.logits.detach(), output.features.detach())
        self.samples += len(batch["labels"])
        return loss

    def on_train_epoch_start(self) -> None:
        self.chain.before_epoch(self)

    def on_train_epoch_end(self) -> None:
        self.chain.after_epoch(self)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.chain.edit_gradients(self)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 0.0
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if scaler is None or scaler.get_scale() >= scale:  # a lower scale: the step was skipped (inf or nan)
            self.steps += 1
            self.chain.after_step(self)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        assert self._last is not None
        self.chain.after_batch(self, *self._last)
        self._last = None
        if self.after_batch is not None:
            self.after_batch(self.trainer, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output, labels = self(batch), batch["labels"]
        if labels.ndim == 2:
            n_predicted = int((labels != IGNORED).sum())
            self.log("validation/loss", self.task_loss(batch, output), batch_size=max(1, n_predicted), on_epoch=True)
            return
        correct = (output.logits.argmax(1) == labels).float()
        self.log("validation/accuracy", correct.mean(), batch_size=len(correct), on_epoch=True)

    @property
    def progress(self) -> float:
        """How much of the current stage is done, 0 … 1."""
        if self.allowance is not None:
            return self.allowance.progress(self)
        return self.trainer.global_step / self.stage_steps if self.stage_steps else 1.0

    @property
    def steps_unknown(self) -> bool:
        """Is the stage ended by something else than a number of steps?"""
        return self.allowance is not None and self.allowance.unit != "steps"

    # -- optimizer -----------------------------------------------------------------------------------------------
    def configure_optimizers(self) -> Any:
        optimizer = self.chain.optimizer(self)
        if optimizer is None:
            optimizer = self.make_optimizer()
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer, FINE if self.steps_unknown else self.stage_steps)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Where the number of steps is not known, the rate follows what is used of the stage's allowance."""
        if self.steps_unknown:
            scheduler.last_epoch = round(self.progress * FINE) - 1
        super().lr_scheduler_step(scheduler, metric)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer over what is trainable now, as the strategies group it."""
        optimizer = self.optimizer_factory(self.chain.parameter_groups(self, self.parameter_groups()))
        own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.trained = max(self.trained, sum(p.numel() for p in own))
        return optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters in two groups: weights, and what must not decay (biases, norms, scales)."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in trainable if p.ndim >= 2]
        plain = [p for p in trainable if p.ndim < 2]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        return [g for g in groups if g["params"]]

    # -- counters ------------------------------------------------------------------------------------------------
    def counts(self) -> dict[str, float]:
        """What the run has done so far: optimizer steps, samples trained on, floating-point operations, and the most
        parameters that were trained at once."""
        return {
            "steps": self.steps, "samples": self.samples, "flops": self.flops.flush(self.backbone),
            "trained_parameters": self.trained,
        }  # fmt: skip

    def set_counts(self, counts: dict[str, float]) -> None:
        """Inverse of `counts`."""
        self.steps, self.samples, self.flops.total = int(counts["steps"]), int(counts["samples"]), counts["flops"]
        self.trained = int(counts.get("trained_parameters", 0))
        self.flops.drop()

    # -- checkpoints -----------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clplatform"] = {
            "strategy": self.chain.state_dict(),
            "counts": self.counts(),
            "seconds": self.seconds,
            "position": list(self.position),
            "rng": random_state(self.generator),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint["clplatform"]
        self.chain.load_state_dict(ours["strategy"])
        self.set_counts(ours["counts"])
        self.seconds = ours.get("seconds", 0.0)
        self._pending_rng = ours["rng"]

    def on_train_start(self) -> None:
        if self._pending_rng is not None:
            set_random_state(self._pending_rng, self.generator)
            self._pending_rng = None
