"""L2 anchor: the plain quadratic penalty that EWC is compared with (Kirkpatrick et al. 2017, Fig. 2).

    L(θ) = L_t(θ) + λ/2 ‖θ − θ*_{t−1}‖²

A head's new classes are not anchored. Costs one copy of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from torch import Tensor

from clplatform.regularization.quadratic import squared_distance
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class L2Anchor(Strategy):
    """Hold every parameter near its old value.

    Args:
        strength: λ.
    """

    family = "regularization"
    problems = PROBLEMS
    needs = frozenset({"boundaries"})

    def __init__(self, *, strength: Annotated[float, Ge(0)]) -> None:
        self.strength = strength
        self.anchor: dict[str, Tensor] = {}

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.anchor:
            return {}
        return {"l2_anchor": self.strength * squared_distance(learner, self.anchor)}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.anchor = {n: p.detach().clone() for n, p in learner.named_parameters() if p.requires_grad}

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": sum(a.numel() for a in self.anchor.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.anchor = dict(state["anchor"])
