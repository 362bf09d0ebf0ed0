"""CLS-ER, replay with complementary learning systems (Arani, Sarfraz & Zonooz 2022, Algorithm 1).

    L = E_{(x,y)~B∪M} ℓ(f(x; θ_W), y) + λ E_{(x,y)~M} ‖f(x; θ_W) − f(x; θ_*)‖²

Two moving averages of the working model θ_W are semantic memories: the plastic θ_P and the stable θ_S. θ_*, chosen for
each replayed sample, is the one that gives its true class the higher probability. After an optimizer step each is
brought up to date with a probability of its own, higher for the plastic one:

    θ_P = α_P θ_P + (1 − α_P) θ_W  with probability r_P,    θ_S = α_S θ_S + (1 − α_S) θ_W  with probability r_S

where α is at most 1 − 1/(t+1) in step t, as in the authors' code. The stable model predicts. ‖·‖² is the mean over the
batch and over the logits; the averages run in eval mode (in the authors' code their batch norm trains). As there, the
memory is a reservoir that is filled and used from the first steps on, and a sample competes each time it is trained on.

Costs `capacity` stored samples, two copies of the model, and in each step one more batch and two forward passes of it.
A saved model holds the working and the stable weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from clplatform.memory.buffer import Buffer, append, pick, raw_rows
from clplatform.module.average import Average
from clplatform.strategy.base import Run, Strategy
from clplatform.types import MASKED, Batch, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

Share = Annotated[float, Ge(0), Le(1)]


class CLSER(Strategy):
    """Replay under two slow copies of the model, the slower of which predicts.

    Args:
        capacity: samples in the memory.
        batch_size: samples drawn in each step; None: as many as the batch has.
        strength: λ.
        plastic_decay, stable_decay: α_P, α_S.
        plastic_rate, stable_rate: r_P, r_S.
        device: where the memory lives.
    """

    family = "replay"
    needs = frozenset({"memory"})
    excludes = frozenset({"expansion"})
    first_experience_is_finetuning = False
    why_not = "the memory and averages of the whole model are used from the first steps on"

    def __init__(
        self,
        *,
        capacity: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)] | None,
        strength: Annotated[float, Ge(0)],
        plastic_decay: Share,
        stable_decay: Share,
        plastic_rate: Share,
        stable_rate: Share,
        device: str,
    ) -> None:
        self.buffer = Buffer(capacity=capacity, device=device)
        self.batch_size, self.strength = batch_size, strength
        self.decays, self.rates = (plastic_decay, stable_decay), (plastic_rate, stable_rate)
        self.plastic: Average | None = None  # prediction does not need it, so it is not part of the model

    # -- the two semantic memories ----------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if self.plastic is None:
            self.plastic, learner.extras["cls_er"] = Average(learner), Average(learner)
        for average in self.averages(learner):
            average.grow(learner)

    def averages(self, learner: Learner) -> tuple[Average, Average]:
        """The plastic and the stable model."""
        assert self.plastic is not None
        stable: Any = learner.extras["cls_er"]
        return self.plastic, stable

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        assert self.plastic is not None
        self.plastic.to(learner.device)

    def after_step(self, learner: Learner) -> None:
        chances = torch.rand(2, generator=learner.generator).tolist()
        for average, decay, rate, chance in zip(self.averages(learner), self.decays, self.rates, chances, strict=True):
            if chance < rate:
                average.update(learner, decay)

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        # With gradients it is the working model that is meant, whose importances others may ask for.
        if learner.training or torch.is_grad_enabled():
            return run(batch)
        with self.averages(learner)[1].in_place_of(learner):
            return run(batch)

    # -- replay ---------------------------------------------------------------------------------------------------------
    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        if not len(self.buffer):
            return batch
        rows = self.buffer.sample(self.batch_size or len(batch["labels"]), learner.generator)
        return append(batch, rows, learner.source_of(self))

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not len(self.buffer):
            return {}
        replayed, answer = pick(batch, output, batch["source"] == learner.source_of(self))
        target = self.target(learner, replayed)
        known = target > MASKED / 2  # another task's classes are not compared
        gap = ((answer.logits - target) ** 2 * known).sum() / known.sum()
        return {"consistency": self.strength * gap}

    def target(self, learner: Learner, replayed: Batch) -> Tensor:
        """Logits [B, K] of the average that is surer of a sample's true class."""
        plastic, stable = (average(learner, replayed).logits for average in self.averages(learner))
        label = replayed["labels"][:, None]
        return torch.where(stable.softmax(1).gather(1, label) > plastic.softmax(1).gather(1, label), stable, plastic)

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        self.buffer.add(raw_rows(batch), learner.generator)

    # -- bookkeeping -----------------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        held = 2 * self.plastic.n_floats() if self.plastic else 0
        return {"extra_parameters": held, **self.buffer.cost()}

    def state_dict(self) -> dict[str, Any]:
        plastic = dict(self.plastic.state_dict()) if self.plastic else {}
        return {"buffer": self.buffer.state_dict(), "plastic": plastic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.plastic is not None
        self.buffer.load_state_dict(state["buffer"])
        self.plastic.load_state_dict(state["plastic"])
