"""Cumulative training: the model goes on, on the data of all experiences so far (Lomonaco et al. 2021, `Cumulative`).

    L(θ) = 1/N Σ_{k≤t} Σ_{(x,y) ∈ D_k} ℓ(f(x), y),  N = Σ_{k≤t} |D_k|,  starting from θ_{t−1}

An upper bound that keeps all data, so no strategy in the sense of the field. Its cost grows with the square
of the number of experiences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Data, Experience

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Cumulative(Strategy):
    """Train on everything seen so far, starting from the current weights."""

    family = "baseline"
    problems = PROBLEMS
    needs = frozenset({"past_data"})
    excludes = frozenset({"expansion"})
    why_not = "one model is trained on all experiences at once"

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        for past in reversed(learner.past):
            data = past + data
        return data
