"""L2 Init, or regenerative regularization (Kumar et al. 2023, L_reg).

    L(θ) = L_t(θ) + λ ‖θ − θ_0‖²

θ_0 are the weights before any training; a head's new rows are pulled to what they were initialised with. No ½, as in
the paper. It keeps a model able to learn (weights that the latest data does not need drift back), not what it has
learned; unlike weight decay it does not pull to zero. It acts in the first experience already.

Costs one copy of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from clplatform.regularization.quadratic import overlap, squared_distance
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class L2Init(Strategy):
    """Hold every parameter near its initial value.

    Args:
        strength: λ.
    """

    family = "regularization"
    problems = PROBLEMS
    first_experience_is_finetuning = False
    why_not = "the pull to the initial weights acts from the first steps on"

    def __init__(self, *, strength: Annotated[float, Ge(0)]) -> None:
        self.strength = strength
        self.initial: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        for name, p in learner.named_parameters():
            if not p.requires_grad:
                continue
            old = self.initial.get(name)
            if old is None or old.shape != p.shape:
                self.initial[name] = p.detach().clone()  # new rows have not been trained yet
                if old is not None:
                    self.initial[name][overlap(old, p)] = old[overlap(old, p)].to(p.device)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"l2_init": 2 * self.strength * squared_distance(learner, self.initial)}

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": sum(t.numel() for t in self.initial.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial = dict(state["initial"])
