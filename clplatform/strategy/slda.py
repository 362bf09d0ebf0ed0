"""Deep streaming linear discriminant analysis on frozen features (Hayes & Kanan 2020, Eq. 1–4).

    ŷ(x) = argmax_k w_k·φ(x) + b_k,  w_k = Λ μ_k,  b_k = −½ μ_k·Λ μ_k
    Λ = [(1 − ε) Σ + ε I]⁻¹

μ_k are running class means and Σ is the running covariance within classes, shared by all of them. Classes are taken to be
equally frequent, as in the paper. `target: scaled` shrinks towards tr(Σ)/D · I instead of I, which does not depend on the
features' scale (Friedman 1989; scikit-learn's `shrinkage`).

The paper updates with one sample at a time, Σ ← (n Σ + n/(n+1) (x − μ_y)(x − μ_y)ᵀ) / (n+1), where n counts all samples
and not those of the class, and where the first sample of a class is compared with a mean of zero: the result depends on
the order. Here whole experiences are added and Σ is exactly the scatter of all samples around their class means over
their number, after any number of experiences, in any order; so no base initialisation is needed. In float64.

Nothing is trained; each experience takes one pass over its samples, without augmentation. Costs D² + 2 K D numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from clplatform.memory.statistics import Moments, Readout
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner


class SLDA(Strategy):
    """Classify by linear discriminant analysis.

    Args:
        shrinkage: ε.
        target: what the covariance is shrunk towards: the `identity`, or the identity `scaled` to the mean variance.
    """

    family = "prototype"
    needs = frozenset({"pretrained"})
    excludes = FAMILIES
    first_experience_is_finetuning = False
    why_not = "nothing is trained: the classifier is computed from class means and a covariance"

    def __init__(self, *, shrinkage: Annotated[float, Ge(0), Le(1)], target: Literal["identity", "scaled"]) -> None:
        self.shrinkage, self.target = shrinkage, target
        self.moments: Moments | None = None
        self.extra = 0

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if self.moments is None:
            size: Any = learner.backbone.feature_size
            self.moments = Moments(size, scatter=True)
            learner.extras["slda"] = Readout(size).to(learner.device)
        self.readout(learner).grow(info.n_seen_classes)
        self.extra = self.readout(learner).n_floats()

    @staticmethod
    def readout(learner: Learner) -> Any:
        return learner.extras["slda"]

    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        return []

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        output, readout = run(learner.with_frozen_features(batch, run)), self.readout(learner)
        if learner.training or not readout.known.any():
            return output
        return Output(learner.mask_tasks(readout(output.features), batch["task_labels"]), output.features)

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        assert self.moments is not None
        features, labels = learner.features(experience.train), experience.train.labels.to(learner.device)
        self.moments.update(features, labels, learner.n_classes)
        means = self.moments.means
        weight = means @ torch.linalg.pinv(self.shrunk(self.moments.covariance), hermitian=True)
        self.readout(learner).set(weight, (means * weight).sum(1) / -2, self.moments.counts > 0)

    def shrunk(self, covariance: Tensor) -> Tensor:
        """(1 − ε) Σ + ε T."""
        target = torch.eye(len(covariance)).to(covariance)
        if self.target == "scaled":
            target = target * covariance.diagonal().mean()
        return (1 - self.shrinkage) * covariance + self.shrinkage * target

    # -- bookkeeping ----------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra + (self.moments.n_floats() if self.moments else 0)}

    def state_dict(self) -> dict[str, Any]:
        return self.moments.state_dict() if self.moments else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.moments is not None, "build() comes first"
        self.moments.load_state_dict(state)
