"""Feature distillation (Hou et al. 2019, "Learning a Unified Classifier Incrementally via Rebalancing", Sec. 3.3): the
less-forget constraint of LUCIR.

    L(θ) = L_t(θ) + λ · 1/B Σ_n d(f*(x_n), f(x_n))
    cosine: d(f*, f) = 1 − ⟨f*/‖f*‖, f/‖f‖⟩,    l2: d(f*, f) = ½ ‖f* − f‖²
    λ = λ_base √(C_old / C_new),  if it is adaptive

f are the features that go into the classifier, f* those of the model before this experience (frozen, in eval mode), of all
rows of a batch, replayed ones too. The squared distance `l2` is that of FitNets (Romero et al. 2015, Eq. 3). λ grows with the number of classes that were seen before this experience for each class
that it has, as in the authors' code. LUCIR also has a cosine classifier (`head=cosine`), a memory (`replay`) and a margin
between classes, which is not here. The l2 distance together with a frozen classifier is `lfl`.

Costs one copy of the backbone and one forward pass of it in each step, from the second experience on (and a copy of the head,
which is not used).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from clplatform.strategy.base import Strategy
from clplatform.types import Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner
    from clplatform.teacher import Teacher


class FeatureDistillation(Strategy):
    """Keep the previous model's features on the new data.

    Args:
        strength: λ_base.
        distance: of features: `cosine` looks at their direction only, `l2` at their length too.
        adaptive: scale λ with the share of old classes? If not, it is λ_base.
    """

    family = "distillation"
    needs = frozenset({"boundaries"})

    def __init__(self, *, strength: Annotated[float, Ge(0)], distance: Literal["cosine", "l2"], adaptive: bool) -> None:
        self.strength, self.distance, self.adaptive = strength, distance, adaptive
        self.teacher: Teacher | None = None

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.teacher = learner.snapshot() if experience.index > 0 else None

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.teacher is None:
            return {}
        then, now = self.teacher(batch).features, output.features
        if self.distance == "cosine":
            gap = 1 - F.cosine_similarity(now, then, dim=1)
        else:
            gap = (now - then).square().sum(1) / 2
        return {"feature_distillation": self.weight(learner) * gap.mean()}

    def weight(self, learner: Learner) -> float:
        """λ"""
        ratio = learner.n_old_classes / len(learner.seen[-1].classes)
        return self.strength * (math.sqrt(ratio) if self.adaptive else 1.0)

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.teacher.n_parameters() if self.teacher else 0}
