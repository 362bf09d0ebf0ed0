"""Less-Forgetting Learning (Jung et al. 2016, Eq. 1–3 and Algorithm 1).

    L(θ) = L_t(θ) + λ/2 · 1/B Σ_n ‖f(x_n; θ) − f(x_n; θ*_{t−1})‖²

f are the features that go into the classifier, those of θ* from the model before this experience (frozen, in eval
mode); the sum is over their dimensions, the mean over the batch. The classifier keeps the boundaries it has: what it
had before this experience is frozen, against momentum and weight decay too. The paper expands a domain, where this is
all of the classifier; where classes are added, their rows are trained. Rows that other strategies add count too.
Avalanche's plugin takes the mean over the features' dimensions, without ½: its λ is ours times half their number.

Costs one copy of the model and one forward pass of it in each step, from the second experience on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from clplatform.data import predicted
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner
    from clplatform.teacher import Teacher

Rows = tuple[slice, ...]


class LFL(Strategy):
    """Keep the previous model's features on the new data, and the classifier of the old classes as it is.

    Args:
        strength: λ.
    """

    family = "distillation"
    problems = PROBLEMS
    needs = frozenset({"boundaries"})

    def __init__(self, *, strength: Annotated[float, Ge(0)]) -> None:
        self.strength = strength
        self.teacher: Teacher | None = None
        self.shapes: dict[str, list[int]] = {}  # of the head's parameters after the previous experience

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.teacher = learner.snapshot() if experience.index > 0 else None

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.teacher is None:
            return {}
        gap = output.features - self.teacher(batch).features
        # Where an answer is one of the tokens, the features of all that may be it count.
        gap = gap[batch["answerable"] == 1] if "answerable" in batch else predicted(batch, gap)
        return {"lfl": self.strength / 2 * gap.square().sum(1).mean()}

    def edit_gradients(self, learner: Learner) -> None:
        for p, _, rows in self._kept(learner):
            if p.grad is not None:
                p.grad[rows].zero_()

    @torch.no_grad()
    def after_step(self, learner: Learner) -> None:
        for p, value, rows in self._kept(learner):
            p[rows].copy_(value)

    def _kept(self, learner: Learner) -> Iterator[tuple[nn.Parameter, Tensor, Rows]]:
        """What the head had before this experience: parameter, value, index."""
        if self.teacher is None:
            return
        then = dict(self.teacher.head.named_parameters())
        for name, p in learner.head.named_parameters():
            if name in self.shapes:
                rows = tuple(slice(0, n) for n in self.shapes[name])
                yield p, then[name][rows], rows

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.shapes = {name: list(p.shape) for name, p in learner.head.named_parameters()}

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.teacher.n_parameters() if self.teacher else 0}

    def state_dict(self) -> dict[str, Any]:
        return {"shapes": self.shapes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shapes = state["shapes"]
