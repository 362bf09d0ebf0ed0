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

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.head.multi import MultiHead
from clplatform.module import lora
from clplatform.strategy.base import Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Experts(nn.Module):
    """The classifiers, and the class means that choose among them."""

    means: Tensor  # [M, D], one for each class of each experience
    experience_of_mean: Tensor  # [M]

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        self.head = MultiHead(feature_size=feature_size)
        self.register_buffer("means", torch.zeros(0, feature_size))
        self.register_buffer("experience_of_mean", torch.zeros(0, dtype=torch.int64))

    def grow(self, info: ExperienceInfo) -> None:
        if (self.experience_of_mean == info.index).any():
            return
        self.head.grow(replace(info, task_label=info.index))
        n = len(info.classes)
        self.means = torch.cat([self.means, self.means.new_zeros(n, self.means.shape[1])])
        self.experience_of_mean = torch.cat(
            [self.experience_of_mean, self.experience_of_mean.new_full((n,), info.index)]
        )


class LoRAExperts(Strategy):
    """A low-rank adapter and a classifier for each experience, on a frozen backbone.

    Args:
        rank, alpha, dropout: of the adapters.
        first: what the first experience trains: the `full` backbone, or an `adapter` like the others.
    """

    family = "expansion"
    needs = frozenset({"boundaries"})
    # An earlier expert is out of reach: rows of its classes, penalties and distillation would fail or do nothing.
    excludes = frozenset({"replay", "regularization", "distillation", "prototype"})
    first_experience_is_finetuning = False
    why_not = "every experience trains an adapter and a classifier of its own"

    def __init__(
        self,
        *,
        rank: Annotated[int, Ge(1)],
        alpha: Annotated[float, Gt(0)],
        dropout: Annotated[float, Ge(0), Le(1)],
        first: Literal["full", "adapter"],
    ) -> None:
        self.rank, self.alpha, self.dropout, self.first = rank, alpha, dropout, first
        self.extra = 0
        self.base: list[nn.Parameter] = []  # the backbone's own trainable parameters

    # -- structure ----------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if "lora_experts" not in learner.extras:
            self.base = [p for p in learner.backbone.parameters() if p.requires_grad]
            size: Any = learner.backbone.feature_size
            learner.extras["lora_experts"] = Experts(size).to(learner.device)
            learner.head.requires_grad_(False)  # the experts have their own
        lora.add_adapter(learner.backbone, _name(info.index), rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        self.experts(learner).grow(info)
        experts = self.experts(learner)
        own = sum(p.numel() for p in experts.parameters()) + experts.means.numel()
        self.extra = own + lora.n_parameters(learner.backbone)

    @staticmethod
    def experts(learner: Learner) -> Any:
        return learner.extras["lora_experts"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        whole = self.first == "full" and experience.index == 0
        learner.backbone.requires_grad_(False)
        for p in self.base if whole else lora.adapter_parameters(learner.backbone, _name(experience.index)):
            p.requires_grad_(True)

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Weight decay would wear away the rows of earlier experts, which get no gradient.
        own = {id(p) for p in self.experts(learner).parameters()}
        kept = [{**g, "params": [p for p in g["params"] if id(p) not in own]} for g in groups]
        apart = {"params": [p for g in groups for p in g["params"] if id(p) in own], "weight_decay": 0.0}
        return [g for g in (*kept, apart) if g["params"]]

    # -- the model -------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if learner.training and learner.experience is not None:
            expert = torch.full_like(batch["labels"], learner.experience.index)
            lora.activate(learner.backbone, [_name(learner.experience.index)])
            features = run(batch).features
        else:
            expert = self.choose(learner, batch, run)
            with lora.per_sample(learner.backbone, expert, [_name(e.index) for e in learner.seen]):
                features = run(batch).features
        return Output(self.experts(learner).head(features, expert), features)

    def choose(self, learner: Learner, batch: Batch, run: Run) -> Tensor:
        """The expert of each sample, int64 [B]."""
        if learner.info.task_ids:
            index_of_task = {e.task_label: e.index for e in learner.seen}
            table = torch.tensor([index_of_task.get(t, 0) for t in range(max(index_of_task) + 1)])
            return table.to(batch["task_labels"].device)[batch["task_labels"]]
        experts = self.experts(learner)
        lora.activate(learner.backbone, None)
        similarity = F.normalize(run(batch).features, dim=1) @ F.normalize(experts.means, dim=1).T
        return experts.experience_of_mean[similarity.argmax(1)]

    # -- the end of an experience --------------------------------------------------------------------------------------
    @torch.no_grad()
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        was_training = learner.training
        learner.eval()
        lora.activate(learner.backbone, None)
        experts = self.experts(learner)
        sums = torch.zeros(len(experience.classes), experts.means.shape[1], device=learner.device)
        counts = sums.new_zeros(len(experience.classes))
        classes = torch.tensor(experience.classes, device=learner.device)
        for batch in learner.batches(experience.train):
            position = torch.searchsorted(classes, batch["labels"])
            sums.index_add_(0, position, F.normalize(learner.run(batch).features, dim=1))
            counts += torch.bincount(position, minlength=len(classes))
        experts.means[experts.experience_of_mean == experience.index] = sums / counts[:, None].clamp_min(1)
        learner.train(was_training)

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}


def _name(index: int) -> str:
    return f"experience_{index}"
