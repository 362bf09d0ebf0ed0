"""InfLoRA: low-rank adapters that do not interfere with earlier experiences (Liang & Li 2024, "InfLoRA: Interference-Free
Low-Rank Adaptation for Continual Learning", Sec. 3).

    h = W x + Σ_{i ≤ t} A_i B_i x,  only A_t is trained
    B_t = s U_rᵀ,  (I − M Mᵀ) H_t = U Σ Vᵀ

Before experience t the rows of B_t are designed from the layers' inputs H_t [d, n] on its data: the r directions with most
of their energy in what is orthogonal to M, a basis of what the inputs of earlier experiences span. So W changes nothing
that W x was for those inputs, and still learns where the new ones lie. After the experience M grows until it holds the
share ε_t of the energy of H_t (Eq. 5–9 of GPM), with

    ε_t = ε + (ε_end − ε) t/T,  t = 0 … T − 1

and is kept as DualGPM keeps it: as a basis of its complement once that is the smaller one. Rows of B_t for which no energy
is left are zero. The scale s, which says how fast an adapter learns beside the head, is 1/√3 in the authors' code and not in
the paper. Their code also takes shares of squared energies, so that the same ε leaves more room there than here, where it
is the paper's ‖·‖²_F.

As in the paper keys and values of attention are adapted, and new samples compete among the classes of their own experience
(`classes: own`, the local cross-entropy), so the classifiers of earlier classes stay as they are, to the bit; rows that a
memory adds compete among all classes seen. Inputs are collected in eval mode, all positions of a sequence, padding
included. At its end an adapter is merged into W. A backbone that is not pretrained has nothing to adapt: with `first: full`
the first experience trains the whole backbone, and the adapters start with the second.

Costs one adapter, at most d²/2 numbers for each adapted layer, and two passes over an experience's data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from clplatform.memory.buffer import pick
from clplatform.module import lora
from clplatform.module.rates import all_at_rate
from clplatform.projection.subspace import DualMemory, collected_energy, leading_directions
from clplatform.strategy.base import Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

ADAPTER = "inf_lora"


class InfLoRA(Strategy):
    """Low-rank adapters in directions that earlier experiences do not use.

    Args:
        rank: r.
        scale: s.
        threshold: ε of the first experience.
        final: ε_end, which ε grows to.
        samples: training samples of an experience whose inputs are collected; None: all.
        classes: those that new samples compete among: the experience's `own`, or all `seen`.
        first: what the first experience trains: the `full` backbone, or an `adapter` like the others.
        lr: learning rate of adapters and classifiers where an adapter is trained; None: the optimizer's.
    """

    family = "expansion"
    needs = frozenset({"boundaries", "length"})
    excludes = frozenset({"regularization", "projection", "isolation", "expansion", "prompt"})
    first_experience_is_finetuning = False
    why_not = "every experience trains an adapter that starts anew, in directions that are made for it"

    def __init__(
        self,
        *,
        rank: Annotated[int, Ge(1)],
        scale: Annotated[float, Gt(0)],
        threshold: Annotated[float, Gt(0), Le(1)],
        final: Annotated[float, Gt(0), Le(1)],
        samples: Annotated[int, Ge(1)] | None,
        classes: Literal["own", "seen"],
        first: Literal["full", "adapter"],
        lr: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        self.rank, self.scale, self.threshold, self.final = rank, scale, threshold, final
        self.samples, self.classes, self.first, self.lr = samples, classes, first, lr
        self.base: list[nn.Parameter] = []  # the backbone's own trainable parameters
        self.memory = DualMemory()
        self.n_adapter = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        backbone: nn.Module = learner.backbone
        if not self.n_adapter:
            self.base = [p for p in backbone.parameters() if p.requires_grad]
            lora.add_adapter(backbone, ADAPTER, rank=self.rank, alpha=self.rank, dropout=0.0, roles="kv")
            lora.activate(backbone, [ADAPTER])
            self.n_adapter = lora.n_parameters(backbone)

    def is_full(self, experience: ExperienceInfo) -> bool:
        """Does this experience train the whole backbone?"""
        return self.first == "full" and experience.index == 0

    # -- training -------------------------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        learner.backbone.requires_grad_(False)
        if self.is_full(experience):
            for p in self.base:
                p.requires_grad_(True)
        else:
            self.design(learner, experience)

    @torch.no_grad()
    def design(self, learner: Learner, experience: Experience) -> None:
        """The directions of the adapter, which PEFT calls A and the paper B_t."""
        energies = self.energies(learner, experience)
        for name, layer in lora.named_layers(learner.backbone).items():
            outside = self.memory.outside(name, energies[name])
            directions = leading_directions(energies[name], outside, self.rank)
            layer.lora_A[ADAPTER].weight.copy_(self.scale * directions)
            layer.lora_B[ADAPTER].weight.zero_().requires_grad_(True)

    def energies(self, learner: Learner, experience: Experience) -> dict[str, Tensor]:
        """H_t H_tᵀ of every adapted layer, by name."""
        layers = {name: layer.get_base_layer() for name, layer in lora.named_layers(learner.backbone).items()}
        data = experience.train
        if self.samples is not None:
            data = data.select(torch.randperm(len(data), generator=learner.generator)[: self.samples])
        with collected_energy(layers) as energies:
            learner.features(data)
        return energies

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor | None:
        if self.classes == "seen" or learner.experience is None:
            return None
        new, answer = pick(batch, output, batch["source"] == 0)
        classes = torch.tensor(learner.experience.classes, device=batch["labels"].device)
        # Columns are left out rather than masked: label smoothing is over the classes that compete.
        new["labels"] = torch.searchsorted(classes, new["labels"])
        loss = learner.task_loss(new, Output(answer.logits[:, classes], answer.features), reduction="sum")
        if len(new["labels"]) < len(batch["labels"]):
            loss = loss + learner.task_loss(*pick(batch, output, batch["source"] != 0), reduction="sum")
        return loss / len(batch["labels"])

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert learner.experience is not None
        if self.classes == "own":
            # Weight decay would wear away the classifiers of earlier classes, which get no gradient.
            own = {id(p) for p in learner.head.parameters()}
            kept = [{**g, "params": [p for p in g["params"] if id(p) not in own]} for g in groups]
            apart = {"params": [p for g in groups for p in g["params"] if id(p) in own], "weight_decay": 0.0}
            groups = [g for g in (*kept, apart) if g["params"]]
        return groups if self.is_full(learner.experience) else all_at_rate(groups, self.lr)

    # -- the end of an experience ---------------------------------------------------------------------------------
    @torch.no_grad()
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        lora.merge(learner.backbone, ADAPTER)
        share = self.threshold + (self.final - self.threshold) * experience.index / learner.info.n_experiences
        for name, energy in self.energies(learner, experience).items():
            self.memory.add(name, energy, share)

    # -- bookkeeping ----------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.n_adapter + self.memory.n_floats()}

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state)
