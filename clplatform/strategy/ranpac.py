"""RanPAC: a ridge classifier on random features of a frozen backbone (McDonnell et al. 2023, Eq. 5–7, Algorithm 1).

    h(x) = max(0, Wᵀ φ(x)),  W [D, M] ~ N(0, 1), drawn once
    G = Σ_n h(x_n) h(x_n)ᵀ,  C = Σ_n h(x_n) y_nᵀ  (y one-hot), over all samples of all experiences
    ŷ(x) = argmax_k [C_kᵀ (G + λ I)⁻¹] h(x)

λ is chosen from 10⁻⁸, 10⁻⁷ … 10⁸ after each experience, as in the authors' code: a part of its training data is held
out at random, and the λ with the smallest squared error there wins, fitted on the rest of this experience alone. G and C
are then added up over all of it, so that for a given λ the classifier is the one of all data at once. In float64.

Nothing is trained. `first_session` adapts to the stream first: in the first experience all that is trainable is trained
with the usual loss (choose it with `backbone.freeze`, or add a strategy that puts prompts or adapters into the backbone,
the paper's phase 1), and nothing after that.

Each experience takes one pass over its samples, without augmentation, and operations of the order of N M² + M³. Costs
M² + 2 M K + D M numbers. The paper has M = 10,000; the page has 2,000, with a 25th of the numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn import functional as F

from clplatform.memory import ridge
from clplatform.memory.statistics import Readout, precise
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner

RIDGES = [10.0**exponent for exponent in range(-8, 9)]


class Projected(Readout):
    """A readout of random features."""

    projection: Tensor  # [D, M]

    def __init__(self, feature_size: int, size: int, generator: torch.Generator) -> None:
        super().__init__(size)
        self.register_buffer("projection", torch.randn(feature_size, size, generator=generator))

    def project(self, features: Tensor) -> Tensor:
        """Features [B, D] → random features [B, M]."""
        return (precise(features) @ precise(self.projection)).relu()

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.project(features))


class RanPAC(Strategy):
    """Classify by ridge regression on random features.

    Args:
        size: M, random features.
        ridge: λ; None: chosen after each experience.
        held_out: share of an experience's training data that λ is chosen on.
        first_session: train in the first experience?
    """

    family = "prototype"
    needs = frozenset({"pretrained"})
    excludes = FAMILIES - {"prompt", "expansion"}
    first_experience_is_finetuning = False
    why_not = "the classifier is computed, and nothing is trained after the first experience"

    def __init__(
        self,
        *,
        size: Annotated[int, Ge(1)],
        ridge: Annotated[float, Gt(0)] | None,
        held_out: Annotated[float, Gt(0), Lt(1)],
        first_session: bool,
    ) -> None:
        self.size, self.ridge, self.held_out, self.first_session = size, ridge, held_out, first_session
        self.gram = precise(torch.zeros(0, 0))  # G [M, M]
        self.cross = precise(torch.zeros(0, 0))  # C [M, K]
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if "ranpac" not in learner.extras:
            size: Any = learner.backbone.feature_size
            learner.extras["ranpac"] = Projected(size, self.size, learner.generator).to(learner.device)
        readout = self.readout(learner)
        readout.grow(info.n_seen_classes)
        self.extra = readout.n_floats() + readout.projection.numel()

    @staticmethod
    def readout(learner: Learner) -> Any:
        return learner.extras["ranpac"]

    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        return [Stage("first session")] if self.first_session and experience.index == 0 else []

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if not (self.first_session and len(learner.seen) < 2):  # which trains the backbone
            batch = learner.with_frozen_features(batch, run)
        output, readout = run(batch), self.readout(learner)
        if learner.training or not readout.known.any():
            return output
        return Output(learner.mask_tasks(readout(output.features), batch["task_labels"]), output.features)

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        features, readout = learner.features(experience.train), self.readout(learner)
        target = precise(F.one_hot(experience.train.labels.to(learner.device), learner.n_classes))
        strength = self.add(features, target, readout.project, learner.generator)
        weight = ridge.solve(self.gram, self.cross, strength).T
        readout.set(weight, torch.zeros_like(weight[:, 0]), self.cross.any(0))

    def add(self, features: Tensor, target: Tensor, project: ridge.Project, generator: torch.Generator) -> float:
        """Add samples, features [N, D] and targets [N, K], to G and C; returns the λ that suits them."""
        n = len(features)
        n_held = 0 if self.ridge is not None else min(n - 1, max(1, round(self.held_out * n)))
        order = torch.randperm(n, generator=generator).to(features.device)
        held, rest = ((features[rows], target[rows]) for rows in (order[:n_held], order[n_held:]))
        gram, cross = target.new_zeros(self.size, self.size), target.new_zeros(self.size, target.shape[1])
        ridge.add(gram, cross, project, *rest)
        strength = self.ridge or 1.0  # 1: of a single sample nothing can be held out
        if n_held:
            strength = ridge.best_strength(project, rest, held, gram, cross, RIDGES)
            ridge.add(gram, cross, project, *held)
        if len(self.gram):  # not the first samples
            gram += self.gram.to(gram)
            cross += F.pad(self.cross.to(cross), (0, target.shape[1] - self.cross.shape[1]))
        self.gram, self.cross = gram, cross
        return strength

    # -- bookkeeping ----------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra + self.gram.numel() + self.cross.numel()}

    def state_dict(self) -> dict[str, Any]:
        return {"gram": self.gram, "cross": self.cross}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gram, self.cross = state["gram"], state["cross"]
