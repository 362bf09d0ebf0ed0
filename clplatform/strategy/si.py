"""Synaptic Intelligence (Zenke et al. 2017, Eq. 3–5).

    L(θ) = L_t(θ) + c Σ_i Ω_i (θ_i − θ*_{t−1,i})²
    Ω_i = max(0, Σ_{k<t} ω_{k,i} / (Δ_{k,i}² + ξ)),  ω_{k,i} = −Σ_steps g_i · (θ_i(s+1) − θ_i(s))

ω is by how much weight i lowered the loss of experience k, Δ how far it went meanwhile. No ½, as in the paper and the
authors' code, whose max(0, ·) after each experience this is too. g is the gradient of the loss without this penalty,
of the whole (accumulated) batch, before clipping; the step is the one really taken, with momentum, Adam, clipping or
weight decay. So the penalty is no part of the loss that is differentiated: its value is logged, and its gradient
2cΩ(θ−θ*) is added once g is known. What other strategies add to the loss counts as the task's. Avalanche's plugin
differs: it takes g with the penalty's gradient in it, has a ½, and cuts Ω off at 0.001.

Costs two numbers for each parameter, and four more while an experience is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from clplatform.regularization.path import Path
from clplatform.regularization.quadratic import Quadratic, fit
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class SI(Strategy):
    """Hold every parameter near its old value, the harder the more it helped to lower the earlier losses.

    Args:
        strength: c.
        damping: ξ, which keeps Ω finite where a weight hardly moved.
    """

    family = "regularization"
    problems = PROBLEMS
    needs = frozenset({"boundaries"})

    def __init__(self, *, strength: Annotated[float, Ge(0)], damping: Annotated[float, Gt(0)]) -> None:
        self.strength, self.damping = strength, damping
        self.quadratic = Quadratic()  # Ω around θ*
        self.path = Path()

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.path.clear()

    @torch.no_grad()
    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not len(self.quadratic):
            return {}
        return {"si": 2 * self.strength * self.quadratic.penalty(learner)}

    def edit_gradients(self, learner: Learner) -> None:
        self.path.before_step(learner)
        self.quadratic.add_gradient(learner, 2 * self.strength)

    def after_step(self, learner: Learner) -> None:
        self.path.after_step(learner)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        importance = dict(self.quadratic.weight)
        for name, change in self.path.change.items():
            new = change / (self.path.moved[name] ** 2 + self.damping)
            old = fit(importance[name], new) if name in importance else 0
            importance[name] = (old + new).clamp_min(0)
        named = dict(learner.named_parameters())
        self.quadratic.replace(importance, {name: named[name].detach().clone() for name in importance})
        self.path.clear()

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.quadratic.cost()["extra_parameters"] + self.path.n_floats()}

    def state_dict(self) -> dict[str, Any]:
        return {"quadratic": self.quadratic.state_dict(), "path": self.path.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quadratic.load_state_dict(state["quadratic"])
        self.path.load_state_dict(state["path"])
