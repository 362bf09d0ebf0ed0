"""Gradual unfreezing with discriminative learning rates (Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text
Classification", Sec. 3.1 and 3.3).

    trained in epoch e = head and top min(⌊e / E⌋ · n, N) of N blocks,   η_d = η / s^d

The head is trained alone first, then the top blocks join it, n of them every E epochs; the embeddings are the last. d is the
depth: 0 for the head, 1 for the top block (and what of the backbone is in no block), N for the embeddings. The new classes of a
later experience have random weights too, so that the head may start alone again (`experiences: each`); either part can be
switched off. The paper: E = n = 1 and s = 2.6, for four blocks; for BERT's thirteen s = 1/0.95 was found best (Sun et al. 2019,
"How to Fine-Tune BERT for Text Classification?").

Blocks that are not unfrozen at the end of a stage stay as they were. What is frozen gets no gradient, and so no weight decay;
its dropout stays on, as with the authors. After a stage everything is trainable again, so that penalties and importances see the
whole model. Blocks are counted in whole epochs: there have to be enough of them, or n has to be larger.

Costs nothing; frozen epochs are cheaper, since gradients end at the lowest block that is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import nn

from clplatform.strategy.base import Strategy
from clplatform.types import Batch, ClplatformError, Experience, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner


class GradualUnfreezing(Strategy):
    """Unfreeze the backbone from the top, and train lower blocks more slowly.

    Args:
        experiences: where the backbone starts frozen: in `each` experience, the `first`, or `none`.
        epochs: E.
        blocks: n.
        rate_decay: s; 1: one learning rate for all.
    """

    family = "regularization"
    excludes = frozenset({"projection", "expansion", "isolation", "prompt", "prototype", "plugin"})
    first_experience_is_finetuning = False
    why_not = (
        "it decides itself, epoch by epoch, which parts of the one backbone are trained, the first experience included"
    )

    def __init__(
        self,
        *,
        experiences: Literal["each", "first", "none"],
        epochs: Annotated[int, Ge(1)],
        blocks: Annotated[int, Ge(1)],
        rate_decay: Annotated[float, Ge(1)],
    ) -> None:
        self.experiences, self.epochs, self.blocks, self.rate_decay = experiences, epochs, blocks, rate_decay
        self.before: dict[nn.Parameter, bool] = {}  # was it trainable before the stage?
        self.trained: list[tuple[int, nn.Parameter]] = []  # what the stage trains of the backbone, with its depth
        self.depth = 0  # how far down the backbone is trained, at the moment

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if not any(p.requires_grad for p in learner.backbone.parameters()):
            raise ClplatformError(
                "strategy=gradual_unfreezing: nothing of the backbone is trained, so that there is nothing to unfreeze; leave it "
                "out, or what freezes the backbone (backbone.freeze=all, strategy=linear_probe)"
            )

    # -- what is trained --------------------------------------------------------------------------------------------
    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.before = {p: p.requires_grad for p in learner.backbone.parameters()}

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All that the stage will train is in the optimizer from its start; parameters without a gradient stay."""
        depths = depth_of(learner.backbone)
        self.trained = [(depths[p], p) for p in learner.backbone.parameters() if p.requires_grad]
        self.depth = max((d for d, _ in self.trained), default=0)
        if self.rate_decay == 1:
            return groups
        found = []
        for group in groups:
            lr = group["lr"] if "lr" in group else default_rate(learner)
            for depth in sorted({depths.get(p, 0) for p in group["params"]}):
                own = [p for p in group["params"] if depths.get(p, 0) == depth]
                found.append({**group, "params": own, "lr": lr / self.rate_decay**depth})
        return found

    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        # With every batch, as `before_epoch` is not called where an epoch is resumed in its middle.
        depth = self.depth_now(learner)
        if depth != self.depth:
            self.depth = depth
            for d, p in self.trained:
                p.requires_grad_(d <= depth)
        return batch

    def depth_now(self, learner: Learner) -> int:
        """How many blocks, from the top, are trained in this epoch."""
        assert learner.experience is not None
        n_blocks = len(learner.backbone.blocks())
        if self.experiences == "none" or (self.experiences == "first" and learner.experience.index > 0):
            return n_blocks
        return min(learner.current_epoch // self.epochs * self.blocks, n_blocks)

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        for p, trainable in self.before.items():
            p.requires_grad_(trainable)
        self.before, self.trained = {}, []


def depth_of(backbone: Any) -> dict[nn.Parameter, int]:
    """Every parameter of a backbone with its depth: the place of its block from the top, 1 where it is in none."""
    blocks = backbone.blocks()
    depths = dict.fromkeys(backbone.parameters(), 1)
    for depth, block in enumerate(reversed(blocks), start=1):
        depths.update(dict.fromkeys(block.parameters(), depth))
    return depths


def default_rate(learner: Learner) -> float:
    """The optimizer's learning rate."""
    return float(learner.optimizer_factory([{"params": [torch.zeros(1, requires_grad=True)]}]).defaults["lr"])
