"""Adapters that are merged into the weights after each experience, and begin anew (ReLoRA, Lialin et al. 2023, "ReLoRA:
High-Rank Training Through Low-Rank Updates"; there after every few thousand steps).

    LoRA    W ← W + (α/r) B A                                then A is drawn again, B = 0
    DoRA    W ← m ⊙ (W + (α/r) B A) / ‖W + (α/r) B A‖        the same; the lengths m are those of W's rows now
    (IA)³   W ← diag(l) W, b ← l ⊙ b for keys and values, W ← W diag(l) for what feed-forward activations enter;   then l = 1

The model does what it did. What is trained is always one small set of parameters, but the sum of many experiences' changes is
no longer of low rank, and a model without adapters is left. Without it a tuning is one set for all experiences
(`strategy=tuning_experts`: one for each, and kept).

Costs nothing beside the model; but all of the backbone has to be kept, not the adapters alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clplatform.module import lora, scales
from clplatform.strategy.base import FAMILIES, Strategy
from clplatform.types import PROBLEMS, Experience

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Merge(Strategy):
    """Fold LoRA's, DoRA's or (IA)³'s parameters into the weights after each experience."""

    family = "baseline"
    problems = PROBLEMS
    needs = frozenset({"mergeable"})
    excludes = FAMILIES - {"baseline", "replay", "distillation"} | {"cls_er", "ema_teacher"}
    first_experience_is_finetuning = False
    why_not = "the adapters begin anew after each experience, and what was remembered of them belongs to them no more"

    @torch.no_grad()
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        for name in {name for layer in lora.layers(learner.backbone) for name in layer.r}:
            lora.merge(learner.backbone, name)
            lora.renew(learner.backbone, name, learner.generator)
        scales.merge(learner.backbone)
