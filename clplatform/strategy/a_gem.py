"""Averaged gradient episodic memory (Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", Eq. 11).

    g̃ = g − (g·g_ref / g_ref·g_ref) g_ref  where g·g_ref < 0,  else g

g_ref is the gradient of the cross-entropy on a batch drawn from the memory of all earlier experiences: to first order no
step raises the loss on it. It is taken as the step's own gradient is: in train mode, so that dropout is drawn and
batch-norm normalises by the memory's batch and takes it into its statistics, and on augmented samples. g is what the
optimizer would get: all losses, summed over accumulated batches, unscaled, not clipped yet. A parameter that a loss does
not depend on has a zero in its gradient, so that a step may also correct what the batch alone would leave.

The paper keeps equal numbers of samples of each class, which `class_balanced` does within a fixed capacity. Costs
`capacity` stored samples, and from the second experience on the forward and backward pass of the memory's batch in each
step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge

from clplatform.memory.buffer import Buffer, Policy
from clplatform.projection.gradient import gradient_of, project_one, trained_parameters
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, ClplatformError, Experience, StreamInfo

if TYPE_CHECKING:
    from clplatform.learner import Learner


class AGEM(Strategy):
    """Project the gradient so that the loss on a batch from the memory does not rise.

    Args:
        capacity: samples in the memory.
        batch_size: samples drawn in each step (all of them if there are fewer).
        policy: which samples the memory keeps.
        device: where the memory lives.
    """

    family = "projection"
    problems = PROBLEMS
    needs = frozenset({"memory"})
    excludes = frozenset({"expansion"})
    why_not = "earlier samples must pass through the parameters that are trained now"

    def __init__(
        self,
        *,
        capacity: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)],
        policy: Policy,
        device: str,
    ) -> None:
        self.buffer = Buffer(capacity=capacity, policy=policy, device=device)
        self.batch_size = batch_size

    def check(self, info: StreamInfo) -> None:
        if self.buffer.policy == "class_balanced" and info.several_labels:
            raise ClplatformError(
                f"strategy.a_gem.policy balances classes, and samples of stream={info.name} ({info.problem}) have no single one; "
                "give reservoir"
            )

    def edit_gradients(self, learner: Learner) -> None:
        if not len(self.buffer):
            return
        rows = self.buffer.sample(self.batch_size, learner.generator)
        rows["source"] = torch.full((len(rows["labels"]),), learner.source_of(self))
        parameters = trained_parameters(learner)
        project_one(parameters, gradient_of(learner, rows, parameters))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.buffer.add_all(experience.train, learner.generator)

    def cost(self) -> dict[str, int | float]:
        return self.buffer.cost()

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
