"""Elastic weight consolidation (Kirkpatrick et al. 2017, Eq. 3; online: Schwarz et al. 2018, Eq. 9).

    L(θ) = L_t(θ) + λ/2 Σ_{k<t} Σ_i F_{k,i} (θ_i − θ*_{k,i})²          separate
    L(θ) = L_t(θ) + λ/2 Σ_i F̃_i (θ_i − θ*_{t−1,i})²,  F̃_t = γ F̃_{t−1} + F_t     online

with the ½ of the paper and F the diagonal Fisher information from per-sample gradients. Code bases differ:
Avalanche has no ½ and squares the gradient of a batch's mean loss, which is tens of times smaller at a batch
size of 32, so strengths are not portable.

The sum over tasks collapses into one quadratic without approximation. A head's new classes are not anchored. In the paper's
Eq. 9 the penalty is weighed by γ F̃, here by F̃: a factor of γ on λ, which is none at the default γ = 1. A parameter that is
frozen when an experience ends gets no F_t, and keeps γ of what it had.

Costs two numbers for each parameter in both forms, however many tasks there were, and the gradients of `samples`
single samples after each experience.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le
from torch import Tensor

from clplatform.regularization.fisher import Kind, fisher_diagonal
from clplatform.regularization.quadratic import Quadratic, fit
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, ClplatformError, Experience, Output, StreamInfo

if TYPE_CHECKING:
    from clplatform.learner import Learner


class EWC(Strategy):
    """Hold every parameter near its old value, the harder the more the old tasks depend on it.

    Args:
        strength: λ.
        fisher: how the expectation over labels is taken; see `fisher_diagonal`.
        samples: of each experience that the Fisher information is estimated on; None: all.
        online: one running Fisher information around the latest weights instead of one for each experience.
        gamma: γ, how much of the earlier information stays (online only).
    """

    family = "regularization"
    problems = PROBLEMS
    needs = frozenset({"boundaries"})

    def __init__(
        self,
        *,
        strength: Annotated[float, Ge(0)],
        fisher: Kind,
        samples: Annotated[int, Ge(1)] | None,
        online: bool,
        gamma: Annotated[float, Ge(0), Le(1)],
    ) -> None:
        self.strength, self.samples, self.online, self.gamma = strength, samples, online, gamma
        self.kind: Kind = fisher
        self.quadratic = Quadratic()

    def check(self, info: StreamInfo) -> None:
        if self.kind == "exact" and info.several_labels:
            raise ClplatformError(
                "strategy.ewc.fisher=exact sums over all tokens and their classes, which are too many to sum over; for "
                f"stream={info.name} ({info.problem}) give sampled or empirical"
            )

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not len(self.quadratic):
            return {}
        return {"ewc": self.strength * self.quadratic.penalty(learner)}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        fisher = fisher_diagonal(learner, experience.train, self.kind, self.samples)
        if self.online:
            earlier = self.quadratic.weight
            fisher = {n: f + self.gamma * fit(earlier[n], f) if n in earlier else f for n, f in fisher.items()}
            fisher = {n: self.gamma * f for n, f in earlier.items()} | fisher  # what is frozen now was measured before
        now = {name: p.detach().clone() for name, p in learner.named_parameters() if name in fisher}
        if self.online:
            self.quadratic.replace(fisher, self.quadratic.anchor | now)
        else:
            self.quadratic.add(fisher, now)

    def cost(self) -> dict[str, int | float]:
        return self.quadratic.cost()

    def state_dict(self) -> dict[str, Any]:
        return self.quadratic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quadratic.load_state_dict(state)
