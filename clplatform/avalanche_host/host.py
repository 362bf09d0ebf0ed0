"""The order in which plugins' hooks are called, from the doors of a strategy of ours:

    begin          before_training, before_/after_train_dataset_adaptation, before_training_exp
    begin_epoch    before_training_epoch
    begin_step     before_training_iteration, zero_grad
    forward        before_forward, the model
    loss           after_forward, the criterion, before_backward
    edit_gradients after_backward, before_update
    after_step     after_update
    end_step       after_training_iteration
    end_epoch      after_training_epoch
    end            after_training_exp, after_training

This is Avalanche's order for `train(experience)`, called once for each experience. Outside of training, in an evaluation
or a prediction, the hooks of an evaluation's iteration are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EarlyStoppingPlugin, LRSchedulerPlugin
from torch import Tensor, nn

from clplatform.avalanche_host.data import Batches, HostedExperience, to_batch, to_minibatch
from clplatform.avalanche_host.facade import HostedStrategy, quiet
from clplatform.avalanche_host.keepsake import Keepsake
from clplatform.avalanche_host.state import cost, restore, state_of, unsaved
from clplatform.types import Batch, ClplatformError, Data, Output

if TYPE_CHECKING:
    from clplatform.data import Loader
    from clplatform.strategy.base import Run

EVAL_HOOKS = ("before_eval_iteration", "before_eval_forward", "after_eval_forward", "after_eval_iteration")


class Host:
    """Calls the plugins' hooks.

    Args:
        hosted: what plugins see.
        source: number of the rows that plugins bring into a batch.

    Attributes:
        keepsake: what predictions need, in the learner's extras; None: nothing.
        begun: index of the experience that training has begun on; −1: none.
        in_step: is a step waiting for its pass through the model?
    """

    def __init__(self, hosted: HostedStrategy, source: int) -> None:
        self.hosted, self.learner, self.source, self.spec = hosted, hosted.learner, source, hosted.learner.info.input
        self.eval_plugins = [p for p in hosted.made if changes_predictions(p)]
        self.keepsake: Keepsake | None = None
        if self.eval_plugins or hosted.model.eval_classifier is not None:
            self.keepsake = self.learner.extras["avalanche"] = Keepsake()
        self.begun, self.in_step = -1, False
        self.settings: dict[str, Any] = {}  # keyword arguments of every hook
        self._batch: Batch = {}
        self._given: list[Tensor] = []  # the mini-batch as plugins got it
        self._left_over: list[tuple[nn.Parameter, Tensor]] = []

    # -- an experience -------------------------------------------------------------------------------------------
    def begin(self, data: Data, loader: Loader | None) -> Any:
        """Before an experience's training.

        Args:
            data: its training data.
            loader: ours; None outside of a fit.

        Returns:
            The loader to train with: ours, or a plugin's.

        Raises:
            ClplatformError: a plugin needs validation data that there is not.
        """
        hosted, learner = self.hosted, self.learner
        assert learner.experience is not None
        self.begun, hosted.train_epochs = learner.experience.index, learner.stage_epochs
        if loader is not None:
            hosted.train_mb_size = loader.batch_size
            self.settings = {"num_workers": loader.num_workers} if loader.num_workers else {}
        experience = HostedExperience(learner.info, learner.seen, data, "train")
        hosted.start(experience, loader, self._validation(), **self.settings)
        if loader is None or hosted.dataloader is loader:
            return loader
        return Batches(hosted.dataloader, self.spec, self.source, loader.seed)

    def _validation(self) -> list[list[Any]]:
        """The experience's validation data, for plugins that look at metrics."""
        learner, every = self.learner, self.hosted.eval_every
        assert learner.experience is not None
        data = learner.experience.validation
        if any(looks_at_metrics(p) for p in self.hosted.made) and (every < 1 or data is None):
            raise ClplatformError(
                "strategy.avalanche: a plugin follows a metric on validation data; give stream.validation_fraction and "
                "strategy.avalanche.evaluate_every=1 (epochs); the stream's name is validation_stream"
            )
        if every < 1 or data is None:
            return []
        return [[HostedExperience(learner.info, learner.seen, data, "validation")]]

    def end(self) -> None:
        """After an experience's training."""
        self.hosted.finish(**self.settings)
        if self.keepsake is not None:
            self.keepsake.write(self.hosted)
        self._batch, self._given, self._left_over = {}, [], []

    # -- an epoch ------------------------------------------------------------------------------------------------
    def begin_epoch(self) -> None:
        self.hosted._before_training_epoch(**self.settings)
        self._stop_if_asked()

    def end_epoch(self) -> None:
        hosted = self.hosted
        # Avalanche leaves its loop in an epoch's beginning: before its first batch, or of the one after a stop.
        if hosted._stop_training and hosted.clock.train_epoch_iterations == 0:
            return
        hosted._after_training_epoch(**self.settings)
        if hosted._stop_training and self.learner.trainer.current_epoch + 1 < hosted.train_epochs:
            hosted._before_training_epoch(**self.settings)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.hosted._stop_training:
            self.learner.trainer.should_stop = True

    # -- a step --------------------------------------------------------------------------------------------------
    def begin_step(self, batch: Batch) -> Batch:
        """Before the step; returns the batch as plugins have left it."""
        hosted = self.hosted
        self._show(batch)
        hosted._before_training_iteration(**self.settings)
        hosted.optimizer.zero_grad()
        hosted.loss = hosted._make_empty_loss()
        self.in_step = True
        return self._shown()

    def _show(self, batch: Batch) -> None:
        self._batch, self._given = batch, to_minibatch(batch, self.spec)
        self.hosted.mbatch = list(self._given)  # type: ignore[assignment]

    def _shown(self) -> Batch:
        """The batch, or what plugins have made of the mini-batch."""
        now: Any = self.hosted.mbatch
        if len(now) != len(self._given) or any(a is not b for a, b in zip(now, self._given, strict=True)):
            self._batch, self._given = to_batch(now, self.spec, self.source, self._batch), list(now)
        return self._batch

    def forward(self, batch: Batch, run: Run) -> Output:
        """The step's own pass, with the batch as it was augmented and as later strategies have extended it."""
        hosted, self.in_step = self.hosted, False
        if batch is not self._batch:
            self._show(batch)
        hosted._before_forward(**self.settings)
        output = run(self._shown())
        hosted.model.features = output.features
        return Output(hosted.model.tail(output.logits), output.features)

    def loss(self, output: Output) -> Tensor:
        """The criterion and what plugins add."""
        hosted = self.hosted
        hosted.mb_output = output.logits  # type: ignore[assignment]
        hosted._after_forward(**self.settings)
        hosted.loss += hosted.criterion()
        hosted._before_backward(**self.settings)
        # What a plugin's own backward passes have left is there in Avalanche's, too: it zeroes gradients earlier.
        self._left_over = [(p, p.grad) for p in hosted.model.parameters() if p.grad is not None]
        return hosted.loss.sum()

    def edit_gradients(self) -> None:
        for parameter, gradient in self._left_over:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        self._left_over = []
        self.hosted._after_backward(**self.settings)
        self.hosted._before_update(**self.settings)

    def after_step(self) -> None:
        self.hosted._after_update(**self.settings)

    def end_step(self) -> None:
        self.hosted._after_training_iteration(**self.settings)
        self._stop_if_asked()

    # -- outside of training -------------------------------------------------------------------------------------
    def evaluate(self, batch: Batch, run: Run) -> Output:
        """A pass with the classifier for evaluation, and what plugins make of its output."""
        hosted, output = self.hosted, run(batch)
        if self.keepsake is not None and self.keepsake.unread and self.begun < 0:  # a saved model
            self.keepsake.read(hosted)
        logits = hosted.model.evaluate(output.features)
        if logits is None:
            logits = hosted.model.tail(output.logits)
        if not self.eval_plugins:
            return Output(logits, output.features)
        before = hosted.mbatch, hosted.mb_output, hosted.is_training
        unknown = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        hosted.mbatch = to_minibatch({"labels": unknown, **batch}, self.spec)  # type: ignore[assignment]
        hosted.is_training, hosted.mb_output = False, logits  # type: ignore[assignment]
        with quiet():
            for hook in EVAL_HOOKS:
                for plugin in self.eval_plugins:
                    getattr(plugin, hook)(hosted, **self.settings)
        logits = hosted.mb_output
        hosted.mbatch, hosted.mb_output, hosted.is_training = before
        return Output(logits, output.features)  # type: ignore[arg-type]

    # -- state ---------------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        return cost(self.hosted)

    def unsaved(self) -> list[str]:
        return unsaved(self.hosted)

    def state_dict(self) -> dict[str, Any]:
        return state_of(self.hosted)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self.hosted, state)
        if self.keepsake is not None:
            self.keepsake.unread = False


def hosting(*, source: int, **settings: Any) -> Host:
    """A host; `source` as of `Host`, the rest as of `HostedStrategy`."""
    with quiet():
        return Host(HostedStrategy(**settings), source)


def changes_predictions(plugin: Any) -> bool:
    """Does a plugin do anything in the hooks around a pass outside of training? (A schedule only looks.)"""
    opens = any(getattr(type(plugin), h, None) is not getattr(SupervisedPlugin, h) for h in EVAL_HOOKS)
    return opens and not isinstance(plugin, LRSchedulerPlugin)


def looks_at_metrics(plugin: Any) -> bool:
    """Does a plugin follow a metric on validation data?"""
    return isinstance(plugin, EarlyStoppingPlugin) or (
        isinstance(plugin, LRSchedulerPlugin) and plugin.metric == "val_loss"
    )
