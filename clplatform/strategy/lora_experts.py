"""One LoRA expert per experience, chosen by task id or by the nearest class mean (S-Prompts' idea, Wang et al. 2022).

Experience t trains a low-rank adapter W + (α/r) B_t A_t (Hu et al. 2022, Eq. 3) and a classifier of its own, on a
frozen backbone; nothing that an earlier experience learned is touched again. At inference a sample goes to the expert
of its task id, or, where task ids are hidden, of the class mean that is nearest (cosine) to its features from the bare
backbone, which are the same before and after every experience:

    t(x) = experience of argmax_k cos(h(x), μ_k)

A backbone that is not pretrained has nothing to adapt: with `first: full` the first experience trains the whole
backbone, which is frozen afterwards (first-session adaptation, Panos et al. 2023).

Costs r·(d_in + d_out) parameters for each adapted layer and experience, one mean per class, and without task ids a
second forward pass at inference. Rows of a batch with different experts run in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from clplatform.module import lora
from clplatform.module.experts import Experts
from clplatform.module.rates import all_at_rate
from clplatform.strategy.base import Run, Strategy
from clplatform.types import PROBLEMS, Batch, ClplatformError, Experience, ExperienceInfo, Output, StreamInfo

if TYPE_CHECKING:
    from clplatform.learner import Learner


class LoRAExperts(Strategy):
    """A low-rank adapter and a classifier for each experience, on a frozen backbone.

    Args:
        rank, alpha, dropout: of the adapters.
        first: what the first experience trains: the `full` backbone, or an `adapter` like the others.
        lr: learning rate of adapters and classifiers where an adapter is trained; None: the optimizer's.
    """

    family = "expansion"
    problems = PROBLEMS - {"question_answering"}  # whose head is none of classes
    needs = frozenset({"boundaries"})
    # An earlier expert is out of reach: rows of its classes, penalties and distillation would fail or do nothing.
    excludes = frozenset({"replay", "regularization", "distillation", "prototype", "plugin"})
    first_experience_is_finetuning = False
    why_not = "every experience trains an adapter and a classifier of its own"

    def __init__(
        self,
        *,
        rank: Annotated[int, Ge(1)],
        alpha: Annotated[float, Gt(0)],
        dropout: Annotated[float, Ge(0), Le(1)],
        first: Literal["full", "adapter"],
        lr: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        self.rank, self.alpha, self.dropout, self.first, self.lr = rank, alpha, dropout, first, lr
        self.extra = 0
        self.base: list[nn.Parameter] = []  # the backbone's own trainable parameters

    def check(self, info: StreamInfo) -> None:
        if info.several_labels and not info.task_ids:
            raise ClplatformError(
                "strategy=lora_experts chooses the expert of a text by its task: give stream.scenario=task_incremental"
            )

    # -- structure ----------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if "lora_experts" not in learner.extras:
            self.base = [p for p in learner.backbone.parameters() if p.requires_grad]
            size: Any = learner.backbone.feature_size
            learner.extras["lora_experts"] = Experts(size).to(learner.device)
            learner.head.requires_grad_(False)  # the experts have their own
        lora.add_adapter(learner.backbone, _name(info.index), rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        self.experts(learner).grow(info)
        self.extra = self.experts(learner).n_floats() + lora.n_parameters(learner.backbone)

    @staticmethod
    def experts(learner: Learner) -> Any:
        return learner.extras["lora_experts"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        learner.backbone.requires_grad_(False)
        for p in (
            self.base
            if self.is_full(experience)
            else lora.adapter_parameters(learner.backbone, _name(experience.index))
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

    # -- the model -------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if learner.training and learner.experience is not None:
            expert = torch.full_like(batch["task_labels"], learner.experience.index)
            lora.activate(learner.backbone, [_name(learner.experience.index)])
            output = run(batch)
        else:
            expert = self.experts(learner).choose(learner, batch, lambda: self.bare(learner, batch, run))
            with lora.per_sample(learner.backbone, expert, [_name(e.index) for e in learner.seen]):
                output = run(batch)
        if learner.info.predicts_text:  # the vocabulary's own output layer
            return output
        return Output(self.experts(learner).head(output.features, expert), output.features)

    def bare(self, learner: Learner, batch: Batch, run: Run) -> Tensor:
        """Features [B, D] without any adapter."""
        lora.activate(learner.backbone, None)
        if run == learner.run and (self.first == "adapter" or len(learner.seen) > 1):  # frozen, and nobody in between
            return learner.frozen_features(batch)
        return run(batch).features

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.is_full(experience):
            self.learn_means(learner, experience)
        lora.activate(learner.backbone, [_name(experience.index)])  # what a training step costs is measured with it

    def learn_means(self, learner: Learner, experience: Experience) -> None:
        if not learner.info.several_labels:
            self.experts(learner).learn_means(learner, experience, lambda batch: self.bare(learner, batch, learner.run))

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}


def _name(index: int) -> str:
    return f"experience_{index}"
