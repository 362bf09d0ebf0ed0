"""O-LoRA: low-rank adapters in subspaces that are orthogonal to each other (Wang et al. 2023, "Orthogonal Subspace Learning
for Language Model Continual Learning", Sec. 3).

    h = W x + Σ_{i ≤ t} (α/r) B_i A_i x
    L(A_t, B_t) = L_task + λ1 Σ_{i<t} Σ_{jk} (A_i A_tᵀ)²_{jk} + λ2 Σ_{P ∈ {A_t, B_t}} ‖P‖

Every experience trains an adapter of its own; those of earlier ones act and stay as they are. The rows of A_i stand for the
directions that experience i learned in, and λ1 keeps those of A_t orthogonal to them. No task ids are needed.

The paper sums the squares of A_i A_tᵀ, as is done here; the authors' code sums absolute values. The term with λ2 is in
their code only (norms, not squared, and not of what is frozen). The authors train a language model, which has no
classifier; here it is the ordinary head, which all experiences share and train.

At its end an experience's adapter is merged into W, as the paper proposes, so that neither training nor inference gets
slower, and a new one starts in its place with B = 0. A backbone that is not pretrained has nothing to adapt: with
`first: full` the first experience trains the whole backbone, and the adapters start with the second.

Costs one adapter, and r·d_in numbers (A_i) for each adapted layer and experience.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from clplatform.module import lora
from clplatform.module.rates import all_at_rate
from clplatform.strategy.base import Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

ADAPTER = "o_lora"


class OLoRA(Strategy):
    """A low-rank adapter for each experience, orthogonal to the earlier ones.

    Args:
        rank, alpha, dropout: of the adapters.
        orthogonality: λ1.
        l2: λ2.
        first: what the first experience trains: the `full` backbone, or an `adapter` like the others.
        lr: learning rate of adapters and classifiers where an adapter is trained; None: the optimizer's.
    """

    family = "expansion"
    needs = frozenset({"boundaries"})
    excludes = frozenset({"regularization", "projection", "isolation", "expansion", "prompt"})
    first_experience_is_finetuning = False
    why_not = "every experience trains an adapter that starts anew, which has no earlier values or gradients"

    def __init__(
        self,
        *,
        rank: Annotated[int, Ge(1)],
        alpha: Annotated[float, Gt(0)],
        dropout: Annotated[float, Ge(0), Le(1)],
        orthogonality: Annotated[float, Ge(0)],
        l2: Annotated[float, Ge(0)],
        first: Literal["full", "adapter"],
        lr: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.orthogonality, self.l2, self.first, self.lr = orthogonality, l2, first, lr
        self.base: list[nn.Parameter] = []  # the backbone's own trainable parameters
        self.directions: dict[str, Tensor] = {}  # A_1 … A_{t−1} [(t − 1) r, d_in] by the name of the layer
        self.n_adapter = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        backbone: nn.Module = learner.backbone
        if not self.n_adapter:
            self.base = [p for p in backbone.parameters() if p.requires_grad]
            lora.add_adapter(backbone, ADAPTER, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
            lora.activate(backbone, [ADAPTER])
            self.n_adapter = lora.n_parameters(backbone)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        backbone: nn.Module = learner.backbone
        adapter = lora.adapter_parameters(backbone, ADAPTER)
        backbone.requires_grad_(False)
        for p in self.base if self.is_full(experience) else adapter:
            p.requires_grad_(True)
        if not self.is_full(experience):
            lora.renew(backbone, ADAPTER, learner.generator)

    def is_full(self, experience: ExperienceInfo) -> bool:
        """Does this experience train the whole backbone?"""
        return self.first == "full" and experience.index == 0

    # -- training -------------------------------------------------------------------------------------------------
    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert learner.experience is not None
        return groups if self.is_full(learner.experience) else all_at_rate(groups, self.lr)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if learner.experience is None or self.is_full(learner.experience):
            return {}
        terms, layers = {}, lora.named_layers(learner.backbone)
        with torch.autocast(learner.device.type, enabled=False):
            if self.directions and self.orthogonality:
                terms["orthogonality"] = self.orthogonality * sum(
                    self.overlap(name, layer.lora_A[ADAPTER].weight) for name, layer in layers.items()
                )
            if self.l2:
                adapter = lora.adapter_parameters(learner.backbone, ADAPTER)
                terms["l2"] = self.l2 * torch.stack([torch.linalg.vector_norm(p) for p in adapter]).sum()
        return terms

    def overlap(self, name: str, a: Tensor) -> Tensor:
        """Σ_{i<t} Σ_{jk} (A_i A_tᵀ)²_{jk} of one layer."""
        self.directions[name] = self.directions[name].to(a.device)
        return (self.directions[name] @ a.T).square().sum()

    # -- the end of an experience ---------------------------------------------------------------------------------
    @torch.no_grad()
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.is_full(experience):
            return
        for name, layer in lora.named_layers(learner.backbone).items():
            a = layer.lora_A[ADAPTER].weight.detach().clone()
            earlier = [self.directions[name].to(a.device)] if name in self.directions else []
            self.directions[name] = torch.cat([*earlier, a])
        lora.merge(learner.backbone, ADAPTER)

    # -- bookkeeping ----------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.n_adapter + sum(d.numel() for d in self.directions.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"directions": dict(self.directions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.directions = dict(state["directions"])
