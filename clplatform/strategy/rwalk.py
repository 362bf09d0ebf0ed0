"""Riemannian Walk (Chaudhry et al. 2018, Eq. 6–8).

    L(θ) = L_t(θ) + λ Σ_i (F_i + s_i) (θ_i − θ*_{t−1,i})²,  F and s each divided by its maximum over all i
    F ← α F̂ + (1 − α) F                                         every Δt steps: EWC++
    s_t = Σ_intervals max(0, ω_i / (½ F_i Δ_i² + ε)),  s ← ½ (s + s_t)    s after the first experience: s_1

ω is by how much weight i lowered the loss over Δt steps (see `regularization/path.py`), Δ how far it went, and
½ F Δ² the distance between the two models that this makes (KL divergence). F̂ is the diagonal Fisher information of the
batch at the interval's start, at the true labels and sample by sample; the authors' code squares batch-mean gradients
instead, which is cheaper and tens of times smaller. As there, a negative score of an interval counts as zero, and
Δt = 10 (MNIST) or 50 (CIFAR), α = 0.9, ε = 0.001. No ½ before λ; the one before F is the paper's. An experience's last
interval may be shorter.

Costs four numbers for each parameter, while an experience is trained five more, and the gradients of a batch's single
samples every Δt steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from clplatform.regularization.fisher import fisher_of_batch
from clplatform.regularization.path import Path
from clplatform.regularization.quadratic import Quadratic, fit
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, Experience, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner

Named = dict[str, Tensor]


class RWalk(Strategy):
    """Hold every parameter near its old value, by Fisher information and by what it achieved along the way.

    Args:
        strength: λ.
        alpha: α, weight of the newest batch's Fisher information.
        interval: Δt, in optimizer steps.
        damping: ε, which keeps scores finite where a weight hardly moved.
    """

    family = "regularization"
    problems = PROBLEMS
    needs = frozenset({"boundaries"})

    def __init__(
        self,
        *,
        strength: Annotated[float, Ge(0)],
        alpha: Annotated[float, Ge(0), Le(1)],
        interval: Annotated[int, Ge(1)],
        damping: Annotated[float, Gt(0)],
    ) -> None:
        self.strength, self.alpha, self.interval, self.damping = strength, alpha, interval, damping
        self.quadratic = Quadratic()  # normalised F + s around θ*
        self.fisher: Named = {}  # running
        self.score: Named = {}  # of the experiences before
        self.gained: Named = {}  # score of this experience
        self.path = Path()  # of this interval
        self.steps, self.measured = 0, False  # in this interval; its Fisher information is known

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.gained = {}
        self._start_interval()

    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self._end_interval()  # what is trained may change

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.measured:
            self.fisher = _average(self.fisher, fisher_of_batch(learner, batch), self.alpha)
            self.measured = True
        if not len(self.quadratic):
            return {}
        with torch.no_grad():  # its gradient is added once the loss's own is known
            return {"rwalk": 2 * self.strength * self.quadratic.penalty(learner)}

    def edit_gradients(self, learner: Learner) -> None:
        self.path.before_step(learner)
        self.quadratic.add_gradient(learner, 2 * self.strength)

    def after_step(self, learner: Learner) -> None:
        self.path.after_step(learner)
        self.steps += 1
        if self.steps == self.interval:
            self._end_interval()

    def _start_interval(self) -> None:
        self.path.clear()
        self.steps, self.measured = 0, False

    def _end_interval(self) -> None:
        for name, change in self.path.change.items():
            if name not in self.fisher:  # trained since the middle of this interval, for the first time
                continue
            fisher = fit(self.fisher[name], change)
            new = (change / (fisher * self.path.moved[name] ** 2 / 2 + self.damping)).clamp_min(0)
            self.gained[name] = fit(self.gained[name], new) + new if name in self.gained else new
        self._start_interval()

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self._end_interval()
        self.score = _average(self.score, self.gained, 0.5)
        self.gained = {}
        fisher, score = _normalised(self.fisher), _normalised(self.score)
        weight = {name: f + fit(score[name], f) if name in score else f for name, f in fisher.items()}
        named = dict(learner.named_parameters())
        self.quadratic.replace(weight, {name: named[name].detach().clone() for name in weight})

    def cost(self) -> dict[str, int | float]:
        held = (*self.fisher.values(), *self.score.values(), *self.gained.values())
        extra = sum(t.numel() for t in held) + self.path.n_floats()
        return {"extra_parameters": self.quadratic.cost()["extra_parameters"] + extra}

    def state_dict(self) -> dict[str, Any]:
        return {
            "quadratic": self.quadratic.state_dict(),
            "fisher": self.fisher,
            "score": self.score,
            "gained": self.gained,
            "path": self.path.state_dict(),
            "steps": self.steps,
            "measured": self.measured,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quadratic.load_state_dict(state["quadratic"])
        self.path.load_state_dict(state["path"])
        self.fisher, self.score, self.gained = (dict(state[name]) for name in ("fisher", "score", "gained"))
        self.steps, self.measured = state["steps"], state["measured"]


def _average(old: Named, new: Named, share: float) -> Named:
    """share · new + (1 − share) · old; what has no old value starts at the new one, a head's new rows at zero."""
    if not old:
        return new
    mixed = {n: share * t + (1 - share) * fit(old[n], t) if n in old else t for n, t in new.items()}
    return {**old, **mixed}


def _normalised(named: Named) -> Named:
    """Divided by the largest value of all."""
    if not named:
        return {}
    largest = torch.stack([t.max() for t in named.values()]).max().clamp_min(torch.finfo(torch.float32).tiny)
    return {name: t / largest for name, t in named.items()}
