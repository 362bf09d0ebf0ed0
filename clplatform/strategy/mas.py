"""Memory Aware Synapses (Aljundi et al. 2018, Eq. 2–3).

    L(θ) = L_t(θ) + λ Σ_i Ω_i (θ_i − θ*_{t−1,i})²
    Ω_i = Σ_{k<t} 1/N_k Σ_n | ∂ ‖f(x_n, θ*_k)‖² / ∂θ_i |

How much the output changes when a weight does; no label is needed. f are the logits of the classes seen so far (where
task ids are known, of the sample's own task). No ½, as in the paper, and Ω is summed over experiences, as the authors
do. The absolute value is taken sample by sample: in that of a batch's mean gradient samples cancel, so strengths for
code that takes this (such as Avalanche's plugin, which averages Ω over experiences besides) are not portable.

Costs two numbers for each parameter, however many tasks there were, and the gradients of `samples` single samples
after each experience.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from clplatform.regularization.per_sample import mean_over_data
from clplatform.regularization.quadratic import Quadratic, fit
from clplatform.strategy.base import Strategy
from clplatform.types import IGNORED, MASKED, PROBLEMS, Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class MAS(Strategy):
    """Hold every parameter near its old value, the harder the more the model's answers depend on it.

    Args:
        strength: λ.
        samples: of each experience that the importance is estimated on; None: all.
    """

    family = "regularization"
    problems = PROBLEMS
    needs = frozenset({"boundaries"})

    def __init__(self, *, strength: Annotated[float, Ge(0)], samples: Annotated[int, Ge(1)] | None) -> None:
        self.strength, self.samples = strength, samples
        self.quadratic = Quadratic()  # Ω around θ*

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not len(self.quadratic):
            return {}
        return {"mas": 2 * self.strength * self.quadratic.penalty(learner)}

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        importance = dict(self.quadratic.weight)
        for name, new in mean_over_data(learner, experience.train, energy, torch.abs, samples=self.samples).items():
            importance[name] = fit(importance[name], new) + new if name in importance else new
        named = dict(learner.named_parameters())
        self.quadratic.replace(importance, {name: named[name].detach().clone() for name in importance})

    def cost(self) -> dict[str, int | float]:
        return self.quadratic.cost()

    def state_dict(self) -> dict[str, Any]:
        return self.quadratic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quadratic.load_state_dict(state)


def energy(output: Output, row: Batch) -> Tensor:
    """‖f(x)‖² of one sample, over the classes that it may have; of a text, the sum over the tokens that are predicted."""
    logits = output.logits.float()
    counts = logits > MASKED / 2
    if row["labels"].ndim == 2:
        counts = counts & (row["labels"] != IGNORED)[:, :, None]
    return torch.where(counts, logits, 0.0).square().sum()
