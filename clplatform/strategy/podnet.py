"""Pooled outputs distillation (Douillard et al. 2020, "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental
Learning", Eq. 1–8).

    L = L_NCA + γ [ λ_c/M Σ_m ‖p(h_m) − p(h*_m)‖² + λ_f ‖f̂ − f̂*‖² ],  γ = √(classes seen / classes of this experience)
    p(h) ∝ [ Σ_tokens h²; Σ_channels h² ],  ‖p(h)‖ = 1,  f̂ = f/‖f‖

(means over the batch). h_m are the M hidden states of the backbone: what passes from block to block, [tokens, channels] in a
Transformer (padding left out) and [channels] in a perceptron, where nothing is pooled; f are the features; those with a star
are of the model before this experience (frozen, in eval mode). The paper pools maps of [channels, height, width] over each of
height and width; tokens stand for both. That h is squared and p has length 1 is the authors' code; the distances are the paper's.

L_NCA is that of a classifier with several proxies of each class, which takes the place of the head and of the
cross-entropy; see `clplatform.module.proxies`. New classes' proxies start at the centers of k-means over their features, but for
those of the first experience. The paper's memory is `replay` beside it; its last stage, which fine-tunes the classifier on
balanced data, is left out.

Costs a copy of the model and one forward pass of it in each step from the second experience on, and the proxies.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from clplatform.module.hidden import capture
from clplatform.module.proxies import LocalSimilarity, nca_loss
from clplatform.strategy.base import Run, Strategy
from clplatform.types import Batch, ClplatformError, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner
    from clplatform.teacher import Teacher


class PODNet(Strategy):
    """Keep pooled statistics of the previous model's hidden states and its features, and classify by proxies.

    Args:
        spatial: λ_c, of hidden states.
        flat: λ_f, of features.
        proxies: of each class.
        margin: δ.
        scale: initial η.
    """

    family = "distillation"
    needs = frozenset({"boundaries"})
    excludes = frozenset({"distillation", "expansion", "isolation", "prompt", "prototype"})
    first_experience_is_finetuning = False
    why_not = "it has a classifier and a loss of its own, and distils hidden states"

    def __init__(
        self,
        *,
        spatial: Annotated[float, Ge(0)],
        flat: Annotated[float, Ge(0)],
        proxies: Annotated[int, Ge(1)],
        margin: Annotated[float, Ge(0)],
        scale: Annotated[float, Gt(0)],
    ) -> None:
        self.spatial, self.flat, self.proxies, self.margin, self.scale = spatial, flat, proxies, margin, scale
        self.teacher: Teacher | None = None
        self.states: list[Tensor] = []  # hidden states of the last training pass
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if learner.label_smoothing:
            raise ClplatformError(
                f"strategy=podnet has a loss of its own, to which label_smoothing={learner.label_smoothing} does not apply: "
                "give label_smoothing=0"
            )
        if "podnet" not in learner.extras:
            size: Any = learner.backbone.feature_size
            own = LocalSimilarity(feature_size=size, n_proxies=self.proxies, scale=self.scale)
            learner.extras["podnet"] = own.to(learner.device)
        classifier = self.classifier(learner)
        classifier.grow(info.n_seen_classes)
        learner.head.requires_grad_(False)  # the proxies take its place
        self.extra = sum(p.numel() for p in classifier.parameters())

    @staticmethod
    def classifier(learner: Learner) -> Any:
        return learner.extras["podnet"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.teacher, self.states = None, []
        if experience.index == 0:
            return
        self.teacher = learner.snapshot()
        features, labels = learner.features(experience.train), experience.train.labels.to(learner.device)
        for label in range(learner.n_old_classes, learner.n_classes):
            self.classifier(learner).imprint(label, features[labels == label], learner.generator)

    # -- the step -------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if learner.training and self.teacher is not None:
            with capture(learner.backbone.blocks()) as states:
                output = run(batch)
            self.states = states or self.states  # none: it was the teacher that ran
        else:
            output = run(batch)
        logits = self.classifier(learner)(output.features)
        return Output(learner.mask_tasks(logits, batch["task_labels"]), output.features)

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        return nca_loss(output.logits, batch["labels"], self.classifier(learner).scale, self.margin)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.teacher is None:
            return {}
        with capture(self.teacher.backbone.blocks()) as then:
            target = self.teacher(batch)
        now, self.states = self.states, []
        mask, factor = batch.get("attention_mask"), self.factor(learner)
        gaps = [distance(pooled(a, mask), pooled(b, mask)) for a, b in zip(now, then, strict=True)]
        flat = distance(F.normalize(output.features, dim=1), F.normalize(target.features, dim=1))
        return {"spatial": factor * self.spatial * torch.stack(gaps).mean(), "flat": factor * self.flat * flat}

    @staticmethod
    def factor(learner: Learner) -> float:
        """γ"""
        return math.sqrt(learner.n_classes / len(learner.seen[-1].classes))

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.states = []

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra + (self.teacher.n_parameters() if self.teacher else 0)}


def pooled(state: Tensor, mask: Tensor | None) -> Tensor:
    """p: a hidden state [B, D] → [B, D], or [B, tokens, D] → [B, D + tokens].

    Args:
        mask: [B, tokens], 0 for padding; None: there is none.
    """
    energy = state.float().square()
    if energy.ndim > 2:
        energy = energy.flatten(1, -2)
        if mask is not None:
            energy = energy * mask[:, :, None]
        energy = torch.cat([energy.sum(1), energy.sum(2)], 1)
    return F.normalize(energy, dim=1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖² of rows [B, n], mean over the batch."""
    return (a - b).square().sum(1).mean()
