"""Gradient episodic memory (Lopez-Paz & Ranzato 2017, Eq. 8–11).

    g̃ = argmin_g̃ ½ ‖g − g̃‖²  with  g̃·g_k ≥ 0 for each earlier experience k
      = g + Gᵀ v*,  v* = argmin_{v ≥ γ} ½ vᵀ G Gᵀ v + (G g)ᵀ v

The rows g_k of G are the gradients of the cross-entropy on what the memory holds of each earlier experience: to first
order no step raises any of these losses. The margin γ, as in the authors' code a bound on v where the paper's dual has
0, favours steps that lower them; with γ > 0 it is the projection of g + γ Σ g_k. Where no g·g_k is negative g stays as
it is. The dual has as many unknowns as there are earlier experiences and is solved exactly (the authors' code adds
10⁻³ to the diagonal of G Gᵀ).

Gradients are taken as the step's own is: in train mode, so that dropout is drawn and batch-norm normalises by the
memory's rows and takes them into its statistics, and on augmented samples. g is what the optimizer would get: all
losses, summed over accumulated batches, unscaled, not clipped yet. A parameter that a loss does not depend on has a zero
in its gradient. The paper keeps an experience's last samples; here it is a uniform sample, and earlier experiences
share `capacity` equally.

Costs `capacity` stored samples, and in each step a forward and backward pass of the memory and two gradients for each
earlier experience.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge

from clplatform.memory.buffer import Buffer
from clplatform.projection.gradient import gradient_of, project, trained_parameters
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, Experience

if TYPE_CHECKING:
    from clplatform.learner import Learner


class GEM(Strategy):
    """Project the gradient so that the loss on no earlier experience's memory rises.

    Args:
        capacity: samples in the memory, of all experiences together.
        batch_size: samples of each experience drawn in each step; None: all that the memory holds.
        margin: γ.
        device: where the memory lives.
    """

    family = "projection"
    problems = PROBLEMS
    needs = frozenset({"boundaries", "memory"})
    excludes = frozenset({"expansion"})
    why_not = "earlier samples must pass through the parameters that are trained now"

    def __init__(
        self,
        *,
        capacity: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)] | None,
        margin: Annotated[float, Ge(0)],
        device: str,
    ) -> None:
        self.buffer = Buffer(capacity=capacity, policy="class_balanced", device=device, group="experience")
        self.batch_size, self.margin = batch_size, margin

    def edit_gradients(self, learner: Learner) -> None:
        if not len(self.buffer):
            return
        parameters = trained_parameters(learner)
        project(parameters, [gradient_of(learner, rows, parameters) for rows in self.draw(learner)], self.margin)

    def draw(self, learner: Learner) -> list[Batch]:
        """Rows of each earlier experience."""
        experience, drawn = self.buffer.column("experience").cpu(), []
        for index in experience.unique():
            places = (experience == index).nonzero()[:, 0]
            if self.batch_size is not None:
                places = places[torch.randperm(len(places), generator=learner.generator)[: self.batch_size]]
            rows = self.buffer.take(places)
            drawn.append({**rows, "source": torch.full((len(rows["labels"]),), learner.source_of(self))})
        return drawn

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.buffer.add_all(experience.train, learner.generator, experience=experience.index)

    def cost(self) -> dict[str, int | float]:
        return self.buffer.cost()

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
