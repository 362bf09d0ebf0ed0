"""The object that plugins see as the strategy: one of Avalanche's own templates, so whatever a plugin reads, writes or
calls is there. Its model and data are the Learner's, and its loop is `host.py`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import BaseLogger
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from avalanche.models.dynamic_optimizers import update_optimizer
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from clplatform.avalanche_host.model import HostedModel, hosted_model
from clplatform.avalanche_host.plugins import Node, make_plugins

if TYPE_CHECKING:
    from clplatform.learner import Learner


class HostedStrategy(SupervisedTemplate):
    """What plugins are given as `strategy`.

    Args:
        learner: whose model is trained.
        plugins: nodes, see `plugins.py`.
        criterion: None: the learner's cross-entropy.
        eval_classifier: see `HostedModel`.
        evaluate_every: epochs between evaluations on validation data; None: never.
        reset_optimizer: does the optimizer forget its state before each experience?

    Attributes:
        made: the plugins of the nodes, without the template's own.
        loader: the stage's loader of ours, if there is one.

    Raises:
        ClplatformError: a plugin cannot be made.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        plugins: list[Node],
        criterion: Any,
        eval_classifier: nn.Module | None,
        evaluate_every: int | None,
        reset_optimizer: bool,
    ) -> None:
        self.learner, self.reset_optimizer = learner, reset_optimizer
        self._model = hosted_model(learner, eval_classifier)
        self._optimizer = merged(learner.make_optimizer())
        texts = learner.info.input.modality == "text"
        self.made = make_plugins(plugins, model=self._model, optimizer=self._optimizer, texts=texts)
        metrics = [accuracy_metrics(stream=True), loss_metrics(stream=True)] if evaluate_every else []
        super().__init__(
            model=self._model,
            optimizer=self._optimizer,
            criterion=criterion or nn.CrossEntropyLoss(label_smoothing=learner.label_smoothing),
            train_mb_size=learner.batch_size,
            eval_mb_size=learner.batch_size,
            device=learner.device,
            plugins=self.made,
            evaluator=EvaluationPlugin(*metrics, loggers=[BaseLogger()], collect_all=False),
            eval_every=evaluate_every or -1,
        )
        if not metrics:  # it would copy the experience in every hook
            self.plugins.remove(self.evaluator)  # type: ignore[arg-type]
        self.loader: Any = None
        self._own_dataset: Any = None  # the experience's, before plugins change it
        self._own_adapted: Any = None  # the same as it is trained on
        self.clean_up()

    # -- the model and its optimizer -----------------------------------------------------------------------------
    @property
    def model(self) -> HostedModel:  # type: ignore[override]
        return self._model

    @model.setter
    def model(self, model: HostedModel) -> None:  # a plugin may put a copy in its place
        if model is not self._model:
            self._model = model
            model.lead()

    @property
    def optimizer(self) -> Optimizer:  # type: ignore[override]
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:  # type: ignore[override]
        self._optimizer = optimizer
        trainer = self.learner._trainer
        if trainer is not None and trainer.strategy.optimizers:  # in the middle of a fit
            trainer.strategy.optimizers = [optimizer]

    def model_adaptation(self, model: Any = None) -> Any:
        """Room for the classes of this experience: in the learner's model there is, a copy gets it here."""
        model = self.model if model is None else model
        if not isinstance(model, HostedModel):
            return super().model_adaptation(model)
        model.grow() if model.is_copy else model.follow()
        if model.eval_classifier is not None and self.experience is not None:
            avalanche_model_adaptation(model.eval_classifier, self.experience)
        return model.to(self.device)

    def make_optimizer(self, reset_optimizer_state: bool = False, **_: Any) -> None:
        """The optimizer over the parameters there are, as Avalanche makes it, but for what was frozen from the start."""
        before = self.optimized_param_id or {}
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad or n in before}
        self.optimized_param_id = update_optimizer(
            self.optimizer, parameters, before or None, reset_state=reset_optimizer_state
        )

    def check_model_and_optimizer(self, **settings: Any) -> None:
        super().check_model_and_optimizer(**{**settings, "reset_optimizer_state": self.reset_optimizer})

    # -- the data ------------------------------------------------------------------------------------------------
    def start(self, experience: Any, loader: Any, eval_streams: list[list[Any]], **settings: Any) -> None:
        """What Avalanche does before an experience's first epoch."""
        self.device, self.loader, self._eval_streams = self.learner.device, loader, eval_streams
        self.is_training, self._stop_training = True, False
        self.model.follow()
        self.model.train()
        self.experience, self._own_dataset = experience, experience.dataset
        with quiet():
            self._before_training(**settings)
            self._before_training_exp(**settings)

    def train_dataset_adaptation(self, **settings: Any) -> None:
        super().train_dataset_adaptation(**settings)
        assert self.experience is not None
        self._own_adapted = self.adapted_dataset if self.experience.dataset is self._own_dataset else None

    def make_train_dataloader(self, **settings: Any) -> None:
        """Ours, which reads whole batches, unless a plugin has changed the data."""
        if self.loader is not None and self.adapted_dataset is self._own_adapted:
            self.dataloader = self.loader
        else:
            super().make_train_dataloader(**settings)

    def finish(self, **settings: Any) -> None:
        """What Avalanche does after an experience's last epoch."""
        self.model.follow()
        with quiet():
            self._after_training_exp(**settings)
            self._after_training(**settings)
        self.clean_up()

    def clean_up(self) -> None:
        """Hold nothing that is of one experience."""
        self._train_cleanup()
        self.is_training, self.loss = False, None  # type: ignore[assignment]
        self.loader = self._own_dataset = self._own_adapted = self.model.features = None


def merged(optimizer: Optimizer) -> Optimizer:
    """Groups of parameters that are treated alike as one group, which some plugins insist on."""
    first, *others = optimizer.param_groups
    for group in others:
        if any(first[name] != group[name] for name in group if name != "params"):
            return optimizer
    for group in others:
        first["params"] += group["params"]
    optimizer.param_groups = [first]
    return optimizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Avalanche's remarks about its own code, which its own filters would show."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", message="To copy construct from a tensor", category=UserWarning)
        yield
    for w in caught:
        if not (issubclass(w.category, DeprecationWarning) and "Call to deprecated" in str(w.message)):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
