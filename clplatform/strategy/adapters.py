"""Bottleneck adapters and a classifier for each experience (AdapterCL, Madotto et al. 2021, "Continual Learning in
Task-Oriented Dialogue Systems").

    Adapter_t(h) = U_t relu(D_t norm_t(h)) + h

After every block of a frozen backbone (Bapna & Firat 2019; Houlsby et al. 2019 have two in each block) experience t trains
an adapter, and on top a classifier of its own; nothing that an earlier experience learned is touched again. At inference a
sample goes to the adapters of its task id. Where task ids are hidden the paper, whose model generates text, takes the
adapter of the lowest perplexity; here it is that of the nearest class mean (cosine) in the features of the bare backbone,
which are the same before and after every experience.

A backbone that is not pretrained has nothing to adapt: with `first: full` the first experience trains the whole backbone,
which is frozen afterwards.

Costs 2·D·(bottleneck + 1) parameters for each block and experience, one mean per class, and without task ids a second
forward pass at inference. Rows of a batch with different adapters run in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clplatform.module import adapter
from clplatform.module.experts import Experts
from clplatform.module.rates import all_at_rate
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class AdapterCL(Strategy):
    """A set of adapters and a classifier for each experience, on a frozen backbone.

    Args:
        bottleneck: size of the space that adapters go through.
        first: what the first experience trains: the `full` backbone, or `adapter`s like the others.
        lr: learning rate of adapters and classifiers where an adapter is trained; None: the optimizer's.
    """

    family = "expansion"
    needs = frozenset({"boundaries", "transformer"})
    # Earlier adapters are out of reach: rows of their classes, penalties and distillation would fail or do nothing.
    excludes = FAMILIES - {"baseline"}
    first_experience_is_finetuning = False
    why_not = "every experience trains adapters and a classifier of its own"

    def __init__(
        self,
        *,
        bottleneck: Annotated[int, Ge(1)],
        first: Literal["full", "adapter"],
        lr: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        self.bottleneck, self.first, self.lr = bottleneck, first, lr
        self.extra = 0
        self.base: list[nn.Parameter] = []  # the backbone's own trainable parameters

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if "adapters" not in learner.extras:
            self.base = [p for p in learner.backbone.parameters() if p.requires_grad]
            size: Any = learner.backbone.feature_size
            learner.extras["adapters"] = Experts(size).to(learner.device)
            learner.head.requires_grad_(False)  # the experts have their own
        adapter.add_adapter(learner.backbone, info.index, bottleneck=self.bottleneck)
        self.experts(learner).grow(info)
        self.extra = self.experts(learner).n_floats() + adapter.n_parameters(learner.backbone)

    @staticmethod
    def experts(learner: Learner) -> Any:
        return learner.extras["adapters"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        learner.backbone.requires_grad_(False)
        for p in (
            self.base if self.is_full(experience) else adapter.adapter_parameters(learner.backbone, experience.index)
        ):
            p.requires_grad_(True)
        if not self.is_full(experience):  # else the features that tell experiences apart are yet to be learned
            self.learn_means(learner, experience)

    def is_full(self, experience: ExperienceInfo) -> bool:
        """Does this experience train the whole backbone?"""
        return self.first == "full" and experience.index == 0

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert learner.experience is not None
        groups = self.experts(learner).without_decay(groups)
        return groups if self.is_full(learner.experience) else all_at_rate(groups, self.lr)

    # -- the model ------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if learner.training and learner.experience is not None:
            expert = torch.full_like(batch["labels"], learner.experience.index)
            adapter.activate(learner.backbone, learner.experience.index)
            features = run(batch).features
        else:
            expert = self.experts(learner).choose(learner, batch, lambda: self.bare(learner, batch, run))
            with adapter.per_sample(learner.backbone, expert):
                features = run(batch).features
        return Output(self.experts(learner).head(features, expert), features)

    def bare(self, learner: Learner, batch: Batch, run: Run) -> Tensor:
        """Features [B, D] without any adapter."""
        adapter.activate(learner.backbone, None)
        if run == learner.run and (self.first == "adapter" or len(learner.seen) > 1):  # frozen, and nobody in between
            return learner.frozen_features(batch)
        return run(batch).features

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.is_full(experience):
            self.learn_means(learner, experience)
        adapter.activate(learner.backbone, experience.index)  # what a training step costs is measured with it

    def learn_means(self, learner: Learner, experience: Experience) -> None:
        self.experts(learner).learn_means(learner, experience, lambda batch: self.bare(learner, batch, learner.run))

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}
