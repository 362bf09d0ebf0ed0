"""The object that plugins see as the strategy's model: x [B, …] → logits [B, K], over the Learner's backbone and head.

Plugins call it, copy it (teachers), freeze it, read its parameters by name, hang things on it and put it in place of
the strategy's. Calls go through all strategies of the chain, as the learner's own do.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from avalanche.models.base_model import BaseModel
from avalanche.models.dynamic_modules import MultiTaskModule
from torch import Tensor, nn

from clplatform.avalanche_host.data import unpack
from clplatform.types import Batch, ClplatformError, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

PARTS = ("backbone", "extras", "head")  # the head last: Avalanche takes the last linear layer for the classifier


class Depth:
    """How many passes of a model and its copies are going on, so that the strategy knows whose pass it sees."""

    def __init__(self) -> None:
        self.passes = 0

    def __enter__(self) -> None:
        self.passes += 1

    def __exit__(self, *_: object) -> None:
        self.passes -= 1

    def __deepcopy__(self, memo: Any) -> Depth:
        return self


class HostedModel(nn.Module, BaseModel):
    """The Learner's model, or a copy that a plugin has made of it.

    Args:
        learner: whose backbone, head and extras it shows.
        eval_classifier: classifies features in place of the head in eval mode, once it has class means.

    Attributes:
        features: of the last pass, [B, D].
        depth: see `Depth`; shared with all copies.
        is_copy: does it have weights of its own?
        tail: what a plugin has put behind the last layer.
        seen: the experiences that the head of a copy has room for.
    """

    learner: Learner
    seen: list[ExperienceInfo]
    # `Any`: a module's attributes are unknown to a type checker, as in the learner.
    backbone: Any
    head: Any

    def __init__(self, learner: Learner, eval_classifier: nn.Module | None = None) -> None:
        super().__init__()
        vars(self)["learner"] = learner  # not a part of this module
        self.eval_classifier = eval_classifier
        self.tail: nn.Module = nn.Identity()
        self.features: Tensor | None = None
        self.depth = Depth()
        self.is_copy = False
        self.follow()
        self.own_names = {*self.__dict__, "seen", "own_names"}

    def follow(self) -> None:
        """Show the learner's parts as they are now."""
        for name in PARTS:
            self._modules[name] = getattr(self.learner, name)
        self.seen = list(self.learner.seen)

    def lead(self) -> None:
        """Make the learner use the parts of this model: a plugin has put it in place of the strategy's."""
        self.is_copy = False
        for name in PARTS:
            setattr(self.learner, name, self._modules[name])
        self.grow()

    def grow(self) -> None:
        """Make room for the classes that the learner has seen."""
        for info in self.learner.seen:
            self.head.grow(info)
        self.seen = list(self.learner.seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostedModel:
        memo[id(self.learner)] = self.learner
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # The features of the last pass hang on a graph, which cannot be copied.
        vars(new).update(copy.deepcopy({**vars(self), "features": None, "is_copy": True}, memo))
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        """A dotted name is a part of a part: `head.linear = Sequential(head.linear, …)` puts the rest behind it."""
        if "." not in name:
            return super().__setattr__(name, value)
        layer = self.get_submodule(name)
        if not (isinstance(value, nn.Sequential) and value[0] is layer and name == self.last_linear()):
            raise ClplatformError(
                f"strategy.avalanche: a plugin replaces the layer {name}, which clplatform's heads own"
            )
        self.tail = value[1:]

    def last_linear(self) -> str:
        """Name of the layer that Avalanche takes for the classifier."""
        return [name for name, module in self.named_modules() if isinstance(module, nn.Linear)][-1]

    def load_state_dict(self, state_dict: Any, *args: Any, **settings: Any) -> Any:
        if self.is_copy:  # plugins bring their copies up to date from the model, whose head may have grown
            self.grow()
        return super().load_state_dict(state_dict, *args, **settings)

    def attributes(self) -> dict[str, Any]:
        """What plugins have hung on it."""
        return {name: value for name, value in self.__dict__.items() if name not in self.own_names}

    # -- calls ---------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, *args: Any) -> Any:
        """x [B, …] → logits [B, K]."""
        return self.classify(x, None)

    def get_features(self, x: Tensor) -> Tensor:
        """x [B, …] → features [B, D]."""
        return self.pass_through(x, None).features

    feature_extractor = get_features

    def classify(self, x: Tensor, task_labels: Tensor | None) -> Tensor:
        output = self.pass_through(x, task_labels)
        self.features = output.features
        if not self.training and (logits := self.evaluate(output.features)) is not None:
            return logits
        return self.tail(output.logits)

    def evaluate(self, features: Tensor) -> Tensor | None:
        """Logits [B, K] of the classifier for evaluation, if there is one and it knows any class."""
        classifier: Any = self.eval_classifier
        return classifier(features) if classifier is not None and classifier.class_means_dict else None

    def pass_through(self, x: Tensor, task_labels: Tensor | None) -> Output:
        if task_labels is None:
            task_labels = x.new_zeros(x.shape[0]).long()
        batch = {**unpack(x, self.learner.info.input), "task_labels": task_labels.to(x.device).long()}
        with self.depth:
            return self.learner.chain.forward(self.learner, batch, self.run)

    def run(self, batch: Batch) -> Output:
        """The bare model, as `Learner.run`."""
        features = self.backbone(batch)
        logits = self.learner.mask_tasks(self.head(features, batch["task_labels"]), batch["task_labels"])
        return Output(logits, features)


class HostedTaskModel(HostedModel, MultiTaskModule):
    """The same where task ids may be used: plugins give task labels [B]; None asks for every task's logits."""

    def forward(self, x: Tensor, *args: Any) -> Any:
        if not args:
            raise ClplatformError(
                "strategy.avalanche: a plugin calls the model without task labels, which this stream's model needs; "
                "choose stream.scenario=class_incremental or domain_incremental"
            )
        if args[0] is not None:
            return self.classify(x, args[0])
        tasks = sorted({e.task_label for e in self.seen})
        return {task: self.classify(x, x.new_full((x.shape[0],), task)) for task in tasks}


def hosted_model(learner: Learner, eval_classifier: nn.Module | None = None) -> HostedModel:
    """The learner's model in the form that this stream needs."""
    return (HostedTaskModel if learner.info.task_ids else HostedModel)(learner, eval_classifier)
