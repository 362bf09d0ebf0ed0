"""Joint training: fresh weights, trained on the data of all experiences so far (multi-task learning, Caruana 1997).

    L(θ) = 1/N Σ_{k≤t} Σ_{(x,y) ∈ D_k} ℓ(f(x), y),  N = Σ_{k≤t} |D_k|,  starting from θ_0

The usual upper bound ("offline", "multi-task"). Unlike cumulative training it starts anew in every experience
from the initial (random or pretrained) weights, so row i of the matrix is what a model would reach that had
seen the first i experiences at once. Its cost grows with the square of the number of experiences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Data, Experience, ExperienceInfo

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Joint(Strategy):
    """Train on everything seen so far, starting from the initial weights."""

    family = "baseline"
    problems = PROBLEMS
    needs = frozenset({"past_data"})
    excludes = frozenset({"expansion"})
    why_not = "one model is trained on all experiences at once"

    def __init__(self) -> None:
        self.initial: dict[str, Tensor] | None = None

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        # Structure is built before weights are loaded, so also after a resume these are the initial ones.
        if self.initial is None:
            self.initial = {n: t.detach().cpu().clone() for n, t in learner.backbone.state_dict().items()}

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if experience.index == 0:
            return
        assert self.initial is not None
        learner.backbone.load_state_dict(self.initial)
        learner.head = learner.fresh_head()

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        for past in reversed(learner.past):
            data = past + data
        return data

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": sum(t.numel() for t in (self.initial or {}).values())}
