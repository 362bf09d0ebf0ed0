"""Fine-tuning: one experience after another, and nothing against forgetting (McCloskey & Cohen 1989).

    L(θ) = L_t(θ), starting from θ_{t−1}

Also called "naive" or "SGD". The lower bound that every strategy is measured against. Costs nothing.
"""

from __future__ import annotations

from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS


class Finetuning(Strategy):
    """Plain training on every experience in turn."""

    family = "baseline"
    problems = PROBLEMS
