"""SEQ*: sequential fine-tuning that forgets little (Zheng et al. 2024, "Learn or Recall? Revisiting Incremental Learning
with Pre-trained Language Models", Sec. 5).

    L(θ) = − 1/B Σ_{(x,y) ∈ B} log [ exp z_y / Σ_{k ∈ seen ∪ future} exp z_k ],  z = classifier(φ(x))

The paper finds that a pretrained model hardly forgets and its classifier does, and so

* (W) warms up: the first experience trains the whole model for `warm_up` epochs;
* (F) freezes the backbone from then on: the rest of the first experience, and all later ones, train the classifier only;
* (O) freezes the classifiers of old classes: only those of the experience's own classes are trained;
* (P) pre-allocates the classifiers of future classes, which take part in the loss from the start, as classes that no
  sample has, and are there when their class arrives (optional in the paper; of no effect with task ids, where the loss
  is over a task's own classes);
* (C) takes a cosine classifier where no old samples are replayed: choose it with `head=cosine`.

All five are here. The authors' classifier has no scale (η = 1; `head.scale`) and their frozen backbone keeps its dropout;
here a frozen backbone is a fixed function, whose features are computed once for each experience, without augmentation.
What is frozen in a classifier is held against momentum and weight decay too, its scale included.

Costs a classifier for all classes of the stream with (P); while an experience is trained on, its features and a copy of
the classifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clplatform.memory.features import FrozenFeatures
from clplatform.module.rates import at_rate
from clplatform.strategy.base import Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.data import Loader
    from clplatform.learner import Learner


class SEQStar(Strategy):
    """Warm up, then freeze the backbone and the classifiers of old classes.

    Args:
        warm_up: epochs of the first experience that train the whole model (W); 0: the backbone is frozen from the start.
        freeze: freeze the backbone after them (F)? If not, there is no warm-up.
        freeze_old: freeze the classifiers of old classes (O)?
        preallocate: let the classifiers of future classes take part in the loss (P)?
        classifier_lr: learning rate of the classifiers; None: the optimizer's.
    """

    family = "isolation"
    needs = frozenset({"boundaries", "length", "pretrained"})
    excludes = frozenset({"baseline", "expansion", "isolation", "prompt", "prototype", "plugin"})
    first_experience_is_finetuning = False
    why_not = "the first experience is a warm-up, after which only classifiers are trained"

    def __init__(
        self,
        *,
        warm_up: Annotated[int, Ge(0)],
        freeze: bool,
        freeze_old: bool,
        preallocate: bool,
        classifier_lr: Annotated[float, Gt(0)] | None,
    ) -> None:
        self.warm_up, self.freeze, self.freeze_old, self.preallocate = warm_up, freeze, freeze_old, preallocate
        self.classifier_lr = classifier_lr
        self.frozen = False  # is the backbone, now?
        self.features = FrozenFeatures()
        self.held: list[tuple[nn.Parameter, Any, Tensor]] = []  # what is frozen in the head: parameter, index, value
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        n_classes = len(learner.info.class_names)
        if "seq_star" not in learner.extras:
            if not self.preallocate or learner.info.task_ids or n_classes == info.n_seen_classes:
                return
            head: Any = learner.make_head()
            head.grow(replace(info, n_seen_classes=n_classes))
            learner.extras["seq_star"] = head.to(learner.device)
        future = self.future(learner)
        self.extra = sum(p.numel() for p in future.parameters() if p.ndim)
        for name, p in learner.head.named_parameters():
            if p.ndim == 0:  # a scale is one for all classes
                owner, _, attribute = name.rpartition(".")
                setattr(future.get_submodule(owner), attribute, p)

    @staticmethod
    def future(learner: Learner) -> Any:
        """Classifiers of all classes, of which those of future ones are used; None without pre-allocation."""
        return dict(learner.extras).get("seq_star")

    # -- what is trained --------------------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if experience.index > 0:
            self._arrive(learner)
        self.held = list(self._old(learner)) if self.freeze_old else []
        if self.freeze and (experience.index > 0 or not self.warm_up):
            self._freeze(learner)

    @torch.no_grad()
    def _arrive(self, learner: Learner) -> None:
        """The new classes' classifiers have been there before."""
        if (future := self.future(learner)) is None:
            return
        new = slice(learner.n_old_classes, learner.n_classes)
        there = dict(future.named_parameters())
        for name, p in learner.head.named_parameters():
            if p.ndim:
                p[new] = there[name][new]

    def _old(self, learner: Learner) -> Iterator[tuple[nn.Parameter, Any, Tensor]]:
        """What belongs to the classifiers of classes that only earlier experiences had."""
        row_of = getattr(learner.head, "row_of", None)  # where each task has classifiers of its own

        def rows(e: ExperienceInfo) -> set[int]:
            return set(e.classes if row_of is None else row_of[e.task_label, list(e.classes)].tolist())

        *earlier, now = learner.seen
        old = sorted(set().union(*map(rows, earlier)) - rows(now))
        for p in learner.head.parameters() if old else ():
            index = old if p.ndim else ...
            yield p, index, p.detach()[index].clone()

    def _freeze(self, learner: Learner) -> None:
        learner.backbone.requires_grad_(False)
        self.frozen = True

    def stages(self, learner: Learner, experience: Experience) -> list[Stage] | None:
        if not self.freeze:
            return None
        warm_up = [Stage("warm-up", max_epochs=self.warm_up)] if experience.index == 0 and self.warm_up else []
        return [*warm_up, Stage("classifier")]

    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        if stage.name == "classifier":
            self._freeze(learner)

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        future = self.future(learner)
        classifiers = [*learner.head.parameters(), *(future.parameters() if future is not None else ())]
        return at_rate(groups, classifiers, self.classifier_lr)

    def loader(self, learner: Learner, loader: Loader) -> Loader:
        if self.frozen:
            self.features.prepare(loader.data)
        return loader

    # -- the step -------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if not self.frozen:
            return run(batch)
        if not learner.training:
            return run(learner.with_frozen_features(batch, run))
        return run({**batch, "features": self.features(learner, batch)})

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        """log Σ_{k ∈ seen ∪ future} exp z_k − log Σ_{k ∈ seen} exp z_k: with it the cross-entropy is over both."""
        future = self.future(learner)
        if future is None or learner.n_classes == len(learner.info.class_names):
            return {}
        logits = future(output.features, batch["task_labels"])[:, learner.n_classes :]
        gap = logits.logsumexp(1) - output.logits.logsumexp(1)
        return {"preallocated": nn.functional.softplus(gap).mean()}

    @torch.no_grad()
    def edit_gradients(self, learner: Learner) -> None:
        for p, index, _ in self.held:
            if p.grad is not None:
                p.grad[index] = 0

    @torch.no_grad()
    def after_step(self, learner: Learner) -> None:
        for p, index, value in self.held:
            p[index] = value.to(p)  # which may have got another precision at the start of training

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.features.clear()

    # -- the end of an experience -----------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.held = []

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}
