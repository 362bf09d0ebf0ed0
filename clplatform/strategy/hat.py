"""Hard attention to the task (Serrà et al. 2018, "Overcoming Catastrophic Forgetting with Hard Attention to the Task").

    h'_l = a_l^t ⊙ h_l,  a_l^t = σ(s e_l^t),  s = 1/s_max + (s_max − 1/s_max) (b − 1)/(B − 1) in batch b of B of an epoch
    ∂L/∂W_{l,ij} ← [1 − min(a_{l,i}^{≤t}, a_{l−1,j}^{≤t})] ∂L/∂W_{l,ij},  a_l^{≤t} = max(a_l^t, a_l^{≤t−1})
    ∂L/∂e_i ← s_max [cosh(s e_i) + 1] / (s [cosh(e_i) + 1]) ∂L/∂e_i
    L(θ, e) = L_t + c Σ_l Σ_i a_{l,i}^t (1 − a_{l,i}^{<t}) / Σ_l Σ_i (1 − a_{l,i}^{<t})

(Sec. 2.) Every experience learns which units it uses, and the weights between units that earlier ones use do not change.
The embeddings e start from N(0, 1) and stay within ±6; in the compensation |s e| is at most 50. At inference s = s_max.

After its experience an embedding is rounded to ±6, where the gates are 0 and 1 exactly. The paper leaves gates that are
nearly so, and protects in proportion; with rounded ones an earlier task's outputs are those of the day it was learned, but
for the order in which a wider classifier's products are summed (a relative 1e-6).

A perceptron's units have gates, all of them. Another backbone (a Transformer) gets an adapter on the output of each block,
whose hidden units have gates (after CTR, Ke et al. 2021, which gates adapters so); its own weights learn in the first
experience only. In both, what has no gate counts as used from the first experience on, and a head's rows learn in the
experience that brings them. Gradients of what is held are zeroed, and its values put back after every step, because momentum
and weight decay would move it. Where gradients are accumulated, the compensation is that of the last batch.

Costs an embedding for each experience (a number for each gated unit), a byte for each gated unit and the adapters; in training
a copy of the trainable parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clplatform.module.gates import Gating
from clplatform.module.held import Held, n_rows
from clplatform.module.rates import at_rate
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, ClplatformError, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner

LIMIT = 6.0  # of an embedding
LIMIT_COSH = 50.0  # of s·e in the compensation


class Attention(nn.Module):
    """The embeddings of all experiences, the units that earlier ones use, and the adapters if there are any."""

    used: Tensor  # bool [units]

    def __init__(self, gating: Gating) -> None:
        super().__init__()
        self.adapters = gating.adapters
        self.embeddings = nn.ParameterList()  # [units] each
        self.register_buffer("used", torch.zeros(sum(gating.sizes), dtype=torch.bool))

    def grow(self, index: int) -> None:
        """Have an embedding for this experience, which is the only one that learns."""
        while len(self.embeddings) <= index:
            self.embeddings.append(nn.Parameter(torch.randn(len(self.used)).to(self.used.device)))
        for i, embedding in enumerate(self.embeddings):
            embedding.requires_grad_(i == index)

    def gates(self, experiences: list[int], s: float) -> Tensor:
        """Gates [n, units] of n experiences."""
        return (s * torch.stack([self.embeddings[i] for i in experiences])).sigmoid()

    @torch.no_grad()
    def finish(self, index: int) -> None:
        """Round the embedding of an experience, and count its units as used."""
        embedding = self.embeddings[index]
        embedding.copy_(torch.where(embedding > 0, LIMIT, -LIMIT))
        self.used |= embedding > 0

    def n_floats(self) -> int:
        return sum(p.numel() for p in self.parameters())


class HAT(Strategy):
    """Learn which units a task uses, and keep what they compute.

    Args:
        s_max: slope of the gates at inference, and at the end of an epoch.
        strength: c.
        first: what the first experience trains of a backbone with adapters: all of it (`full`), or only these (`adapter`).
        adapter_units: hidden units of each adapter, where adapters are needed.
        embedding_lr: learning rate of the embeddings; None: the optimizer's.
        adapter_lr: learning rate of the adapters; None: the optimizer's.
    """

    family = "isolation"
    needs = frozenset({"boundaries", "task_ids"})
    excludes = FAMILIES - {"baseline", "plugin"}
    first_experience_is_finetuning = False
    why_not = "units have gates from the start, and what an earlier experience uses never changes"

    def __init__(
        self,
        *,
        s_max: Annotated[float, Ge(20)],
        strength: Annotated[float, Ge(0)],
        first: Literal["full", "adapter"],
        adapter_units: Annotated[int, Ge(1)],
        embedding_lr: Annotated[float, Gt(0)] | None,
        adapter_lr: Annotated[float, Gt(0)] | None,
    ) -> None:
        self.embedding_lr, self.adapter_lr = embedding_lr, adapter_lr
        self.s_max, self.strength, self.adapter_units = s_max, strength, adapter_units
        self.first = first
        self.gating: Gating | None = None
        self.rows: dict[int, dict[str, int]] = {}  # of the head's parameters, by experience
        self.held = Held()
        self.batch, self.n_batches = 0, 1  # of the epoch: done, and in all
        self.extra = self.n_bytes = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if any(e.task_label == info.task_label for e in learner.seen if e.index != info.index):
            raise ClplatformError(
                f"strategy=hat learns a task once, and in the experience {info.name!r} task {info.task_label} comes back: "
                "choose a stream in which each experience is a task of its own"
            )
        if self.gating is None:
            self.gating = Gating(learner.backbone, self.adapter_units)
            learner.extras["hat"] = Attention(self.gating).to(learner.device)
            if self.first == "adapter" and self.gating.adapted:
                learner.backbone.requires_grad_(False)
        attention = self.attention(learner)
        attention.grow(info.index)
        self.extra, self.n_bytes = attention.n_floats(), attention.used.nbytes
        self.rows[info.index] = n_rows(learner.head)

    @staticmethod
    def attention(learner: Learner) -> Any:
        return learner.extras["hat"]

    def embedding(self, learner: Learner) -> Tensor:
        """Of the latest experience [units]."""
        return self.attention(learner).embeddings[learner.seen[-1].index]

    # -- training -------------------------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.batch, self.n_batches = 0, 1

    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.held.release()
        if experience.index == 0:
            return
        assert self.gating is not None
        attention = self.attention(learner)
        parameters = [*learner.backbone.parameters(), *attention.adapters.parameters()]
        for p, where in self.gating.depends_on(attention.used, parameters):
            self.held.hold(p, where)
        self.held.hold_rows(learner.head, self.rows[experience.index - 1])

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        attention = self.attention(learner)
        groups = at_rate(groups, attention.embeddings.parameters(), self.embedding_lr)
        return at_rate(groups, attention.adapters.parameters(), self.adapter_lr)

    def before_epoch(self, learner: Learner) -> None:
        self.batch, self.n_batches = 0, int(learner.trainer.num_training_batches)

    def slope(self, learner: Learner) -> float:
        """s"""
        if not learner.training or self.n_batches == 1:
            return self.s_max
        low, share = 1 / self.s_max, min(1.0, self.batch / (self.n_batches - 1))
        return low + (self.s_max - low) * share

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        gates = (self.slope(learner) * self.embedding(learner)).sigmoid()
        free = ~self.attention(learner).used
        return {"hat": self.strength * (gates * free).sum() / free.sum().clamp_min(1)}

    @torch.no_grad()
    def edit_gradients(self, learner: Learner) -> None:
        self.held.zero_gradients()
        e, s = self.embedding(learner), self.slope(learner)
        if e.grad is not None:
            e.grad *= self.s_max / s * ((s * e).clamp(-LIMIT_COSH, LIMIT_COSH).cosh() + 1) / (e.cosh() + 1)

    @torch.no_grad()
    def after_step(self, learner: Learner) -> None:
        self.held.restore()
        self.embedding(learner).clamp_(-LIMIT, LIMIT)

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        self.batch += 1

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.held.release()

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.attention(learner).finish(experience.index)

    # -- the model ------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        assert self.gating is not None
        of_task = {e.task_label: e.index for e in learner.seen}
        tasks, row = batch["task_labels"].unique(return_inverse=True)
        experiences = [of_task[task] for task in tasks.tolist()]
        with self.gating(self.attention(learner).gates(experiences, self.slope(learner))[row]):
            return run(batch)

    # -- bookkeeping ----------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra, "buffer_bytes": self.n_bytes}

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch, "n_batches": self.n_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch, self.n_batches = state["batch"], state["n_batches"]
