"""Nearest class mean on frozen features (Mensink et al. 2013; cosine: Rebuffi et al. 2017, Eq. 1–2).

    ŷ(x) = argmin_k ‖φ(x) − μ_k‖²,  μ_k = 1/n_k Σ_{x of class k} φ(x)                  euclidean
    ŷ(x) = argmax_k cos(φ(x), μ_k),  μ_k = 1/n_k Σ_{x of class k} φ(x)/‖φ(x)‖          cosine

The means are running: a class that comes back is averaged over all its samples, so that after any number of
experiences, in any order, the classifier is the one of all data at once. Logits are −½‖φ − μ_k‖² (Mensink's Eq. 4, with
W = I) without the term that all classes share, or the cosine. Means are added up in float64.

Nothing is trained; each experience takes one pass over its samples, without augmentation. Costs two vectors for each
class: its running mean and the classifier's weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clplatform.memory.statistics import Moments, Readout, precise
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner


class NCM(Strategy):
    """Classify by the nearest mean.

    Args:
        metric: what near means: `cosine` or `euclidean`.
    """

    family = "prototype"
    needs = frozenset({"pretrained"})
    excludes = FAMILIES
    first_experience_is_finetuning = False
    why_not = "nothing is trained: the classifier is computed from class means"

    def __init__(self, *, metric: Literal["cosine", "euclidean"]) -> None:
        self.metric = metric
        self.moments: Moments | None = None
        self.extra = 0

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        size: Any = learner.backbone.feature_size
        if self.moments is None:
            self.moments = Moments(size)
            learner.extras["ncm"] = Readout(size).to(learner.device)
        self.readout(learner).grow(info.n_seen_classes)
        self.extra = self.readout(learner).n_floats()

    @staticmethod
    def readout(learner: Learner) -> Any:
        return learner.extras["ncm"]

    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        return []

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        output, readout = run(learner.with_frozen_features(batch, run)), self.readout(learner)
        if learner.training or not readout.known.any():
            return output
        logits = readout(self.scaled(output.features))
        return Output(learner.mask_tasks(logits, batch["task_labels"]), output.features)

    def scaled(self, features: Tensor) -> Tensor:
        """Features as they are compared [B, D]."""
        return F.normalize(precise(features), dim=1) if self.metric == "cosine" else features

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        assert self.moments is not None
        features, labels = learner.features(experience.train), experience.train.labels.to(learner.device)
        self.moments.update(self.scaled(features), labels, learner.n_classes)
        means = self.moments.means
        if self.metric == "cosine":
            weight, bias = F.normalize(means, dim=1), torch.zeros_like(means[:, 0])
        else:
            weight, bias = means, means.square().sum(1) / -2
        self.readout(learner).set(weight, bias, self.moments.counts > 0)

    # -- bookkeeping ----------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra + (self.moments.n_floats() if self.moments else 0)}

    def state_dict(self) -> dict[str, Any]:
        return self.moments.state_dict() if self.moments else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.moments is not None, "build() comes first"
        self.moments.load_state_dict(state)
