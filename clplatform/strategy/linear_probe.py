"""Linear probe: a frozen backbone with a trained head (Alain & Bengio 2017).

    L(W, b) = 1/B Σ_{(x,y) ∈ B} ℓ(W φ(x) + b, y),  φ fixed

What is left of forgetting when the features cannot change: all of it happens in the head. Any head is trained in this
way, a cosine head too. Unlike fine-tuning with `backbone.freeze=all` the features of an experience are computed once,
without augmentation; rows that a memory adds pass through the backbone in every step.

Costs no parameters; while an experience is trained on, the features of its samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from clplatform.memory.features import FrozenFeatures
from clplatform.module.rates import at_rate
from clplatform.strategy.base import Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.data import Loader
    from clplatform.learner import Learner


class LinearProbe(Strategy):
    """Train nothing but the head.

    Args:
        lr: learning rate; None: the optimizer's, which as a rule suits the training of whole backbones.
    """

    family = "baseline"
    needs = frozenset({"pretrained"})
    excludes = frozenset({"expansion", "isolation", "prompt", "prototype", "plugin"})
    first_experience_is_finetuning = False
    why_not = "the backbone is frozen and only the head is trained"

    def __init__(self, *, lr: Annotated[float, Gt(0)] | None) -> None:
        self.lr = lr
        self.features = FrozenFeatures()

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        learner.backbone.requires_grad_(False)

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return at_rate(groups, learner.head.parameters(), self.lr)

    def loader(self, learner: Learner, loader: Loader) -> Loader:
        self.features.prepare(loader.data)
        return loader

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if not learner.training:
            return run(learner.with_frozen_features(batch, run))
        return run({**batch, "features": self.features(learner, batch)})

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.features.clear()
