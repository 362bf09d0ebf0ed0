"""Fine-tuning: learn one experience after another and do nothing against forgetting ("naive", SGD).

The lower bound that every strategy is measured against. Costs nothing.
"""

from __future__ import annotations

from clplatform.strategy.base import Strategy


class Finetuning(Strategy):
    """Plain training on every experience in turn."""

    family = "baseline"
