"""Incremental classifier and representation learning (Rebuffi et al. 2017, "iCaRL", Alg. 1–5).

    L = − 1/B Σ_i Σ_y [ t_iy log g_y(x_i) + (1 − t_iy) log(1 − g_y(x_i)) ]
    t_iy = 1[y = y_i] for the classes of this experience,  t_iy = q_y(x_i) for all others
    ŷ(x) = argmin_y ‖ φ(x) − μ_y ‖,  μ_y ∝ Σ_{p ∈ P_y} φ(p)

g are sigmoids of the logits, q those of the model before this experience (frozen, in eval mode) on the same batch, and
φ and μ_y have length 1. The features are trained on the new samples together with the exemplars P of the earlier
classes, also the latter with q as targets of their own classes. The sum is over classes, the mean over the batch. (Code
bases often take the mean over classes too, which shrinks the gradient as classes come.)

After an experience `capacity` is shared equally among the classes seen: the new ones choose exemplars by herding, earlier
ones keep those they chose first (what an equal division leaves goes to classes drawn at random). The means of all
classes are then taken anew, with the features of now; they are part of the model. Until then, and so in a validation
during training, the largest sigmoid decides. The logits at inference are −‖φ(x) − μ_y‖².

Where a class comes back (a domain-incremental stream) its labels are the targets, and it keeps exemplars of each
experience. Where task ids are known, only the classes of a sample's own task have targets.

Costs `capacity` stored samples, which lengthen every epoch, a copy of the model with one forward pass of it in each step
from the second experience on, and one mean for each class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.memory.buffer import Buffer
from clplatform.memory.herding import add_herded
from clplatform.strategy.base import Run, Strategy
from clplatform.types import MASKED, Batch, ClplatformError, Data, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner
    from clplatform.teacher import Teacher


class ClassMeans(nn.Module):
    """Where the classes are among the features."""

    means: Tensor  # [K, D], of length 1
    known: Tensor  # [K]: does the class have a mean of the model as it is?
    current: Tensor  # [K]: is it a class of the latest experience? Metadata alone tells it, so it is not saved.

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0, feature_size))
        self.register_buffer("known", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("current", torch.zeros(0, dtype=torch.bool), persistent=False)

    def grow(self, info: ExperienceInfo) -> None:
        n = max(0, info.n_seen_classes - len(self.means))
        self.means, self.known = F.pad(self.means, (0, 0, 0, n)), F.pad(self.known, (0, n))
        self.current = torch.zeros_like(self.known)
        self.current[list(info.classes)] = True

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] → −‖φ − μ‖² [B, K], `MASKED` for a class without a mean."""
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        means = self.means.to(features)
        distance = torch.cdist(F.normalize(features, dim=1), means, compute_mode="donot_use_mm_for_euclid_dist")
        return -distance.square().masked_fill(~self.known, -MASKED)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """The means of exemplars [N, D] of these classes [N]."""
        sums = torch.zeros_like(self.means).index_add_(0, labels, F.normalize(features, dim=1).to(self.means))
        self.means, self.known = F.normalize(sums, dim=1), torch.bincount(labels, minlength=len(sums)) > 0


class ICaRL(Strategy):
    """Learn features from new samples and exemplars, and classify by the nearest mean of exemplars.

    Args:
        capacity: exemplars, of all classes together.
    """

    family = "replay"
    needs = frozenset({"boundaries", "memory"})
    excludes = frozenset({"replay", "distillation", "expansion"})
    first_experience_is_finetuning = False
    why_not = "it has a loss, a memory, a distillation and a classifier of its own"

    def __init__(self, *, capacity: Annotated[int, Ge(1)]) -> None:
        self.buffer = Buffer(capacity=capacity, policy="class_balanced")
        self.teacher: Teacher | None = None
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if learner.label_smoothing:
            raise ClplatformError(
                f"strategy=icarl is trained with sigmoids, to which label_smoothing={learner.label_smoothing} does not "
                "apply: give label_smoothing=0"
            )
        if "icarl" not in learner.extras:
            size: Any = learner.backbone.feature_size
            learner.extras["icarl"] = ClassMeans(size).to(learner.device)
        self.classifier(learner).grow(info)
        self.extra = self.classifier(learner).means.numel()

    @staticmethod
    def classifier(learner: Learner) -> Any:
        return learner.extras["icarl"]

    # -- training -------------------------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.classifier(learner).known.fill_(False)  # the features are about to change
        # The head has grown already: the teacher's new rows are untrained, and not used.
        self.teacher = learner.snapshot() if experience.index > 0 else None

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        return data + self.buffer.as_data(learner.source_of(self)) if len(self.buffer) else data

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        logits = output.logits.float()
        target = F.one_hot(batch["labels"], logits.shape[1]).to(logits)
        if self.teacher is not None:
            old = ~self.classifier(learner).current
            target = torch.where(old, self.teacher(batch).logits.float().sigmoid(), target)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(logits)

    # -- the model ------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        output, classifier = run(batch), self.classifier(learner)
        if learner.training or not classifier.known.any():
            return output
        return Output(learner.mask_tasks(classifier(output.features), batch["task_labels"]), output.features)

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        add_herded(self.buffer, experience.train, learner.features(experience.train), learner.generator)
        exemplars = self.buffer.as_data()
        self.classifier(learner).update(learner.features(exemplars), exemplars.labels.to(learner.device))

    def cost(self) -> dict[str, int | float]:
        teacher = self.teacher.n_parameters() if self.teacher else 0
        return {"extra_parameters": self.extra + teacher, **self.buffer.cost()}

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
