"""Dynamically expandable representation (Yan, Xie & He 2021, "DER: Dynamically Expandable Representation for Class Incremental
Learning", Eq. 1–5). Not to be confused with dark experience replay, `der`.

    u = [F_1(x), …, F_t(x)],  p(y|x) = softmax( H_t(u) )
    stage 1:  L = − 1/B Σ log p(y|x) + λ_a ℓ( H_t^a(F_t(x)), y^a )  over F_t, H_t and H_t^a
    stage 2:  L = − 1/B Σ log softmax( H_t(u)/δ )_y  over H_t alone, from new weights, on as many samples of each class

Every experience has a backbone F_t of its own, which starts from the weights of the one before; earlier ones are frozen, in
eval mode. The classifier H_t takes over what H_{t−1} had. The auxiliary classifier H^a tells the classes of this experience
from each other and, as one more class, from all others. Stage 1 is trained on the new data and the memory together; stage 2
on what the memory has of each class and as many new samples, drawn at random, with features that are computed once, in eval mode
and without augmentation. The first experience has stage 1 only, without H^a. The paper's pruning of channels by learned masks
(Eq. 6–10) is left out, so each experience costs a whole backbone ("DER w/o P").

After an experience the memory gives each class an equal share of `capacity`, of exemplars chosen by herding.

Costs a backbone for each earlier experience, with a forward pass through all of them in each step and at inference, the
classifiers, and `capacity` stored samples, which lengthen every epoch.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.data import TensorData
from clplatform.memory.buffer import Buffer
from clplatform.memory.herding import add_herded
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import MASKED, Batch, Data, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner

ROW = "der_net_row"  # the column that marks the samples of stage 2: their place among its features


class Expanded(nn.Module):
    """The backbones of earlier experiences, the classifier over all, and the auxiliary one of the latest experience."""

    classifier: Any  # linear
    auxiliary: Any  # linear, from the second experience on

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.earlier = nn.ModuleList()
        self.classifier = self.auxiliary = None
        self.index = 0  # of the latest experience

    def grow(self, backbone: nn.Module, info: ExperienceInfo) -> None:
        if info.index > len(self.earlier):  # the current backbone is the learner's
            self.earlier.append(copy.deepcopy(backbone).requires_grad_(False).eval())
        old, width = self.classifier, self.feature_size * (len(self.earlier) + 1)
        if old is None or (old.out_features, old.in_features) != (info.n_seen_classes, width):
            self.classifier = nn.Linear(width, info.n_seen_classes)
            if old is not None:
                with torch.no_grad():
                    self.classifier.weight[: old.out_features, : old.in_features] = old.weight
                    self.classifier.bias[: old.out_features] = old.bias
        if info.index > self.index:
            self.index = info.index
            self.auxiliary = nn.Linear(self.feature_size, len(info.classes) + 1)

    def train(self, mode: bool = True) -> Expanded:
        """Earlier backbones stay in eval mode."""
        super().train(mode)
        self.earlier.eval()
        return self

    @property
    def frozen(self) -> list[nn.Module]:
        """No stage may train it."""
        return list(self.earlier.modules())

    def n_floats(self) -> int:
        return sum(t.numel() for t in self.state_dict().values() if t.is_floating_point())


class DERNet(Strategy):
    """Add a backbone in every experience, and classify by the features of all.

    Args:
        capacity: exemplars, of all classes together.
        auxiliary: λ_a.
        epochs: of stage 2.
        temperature: δ.
    """

    family = "expansion"
    needs = frozenset({"boundaries", "memory"})
    excludes = FAMILIES
    first_experience_is_finetuning = False
    why_not = "it has backbones, a classifier, a memory and two stages of training of its own"

    def __init__(
        self,
        *,
        capacity: Annotated[int, Ge(1)],
        auxiliary: Annotated[float, Ge(0)],
        epochs: Annotated[int, Ge(1)],
        temperature: Annotated[float, Gt(0)],
    ) -> None:
        self.buffer = Buffer(capacity=capacity, policy="class_balanced")
        self.auxiliary, self.epochs, self.temperature = auxiliary, epochs, temperature
        self.features: Tensor | None = None  # during stage 2: of its samples
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if "der_net" not in learner.extras:
            size: Any = learner.backbone.feature_size
            learner.extras["der_net"] = Expanded(size)
        expanded = self.expanded(learner)
        expanded.grow(learner.backbone, info)
        expanded.to(learner.device)
        learner.head.requires_grad_(False)  # there is a classifier over all features
        self.extra = expanded.n_floats()

    @staticmethod
    def expanded(learner: Learner) -> Any:
        return learner.extras["der_net"]

    # -- data and stages ------------------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if experience.index > 0:
            self.expanded(learner).earlier[experience.index - 1].load_state_dict(learner.backbone.state_dict())

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        return data + self.buffer.as_data(learner.source_of(self)) if len(self.buffer) else data

    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        stages = [Stage("representation")]
        if len(self.buffer):
            data, trainable = self.balanced(learner, experience), r"^extras\.der_net\.classifier\."
            stages.append(Stage("classifier", data=data, max_epochs=self.epochs, trainable=trainable))
        return stages

    def balanced(self, learner: Learner, experience: Experience) -> TensorData:
        """The samples of stage 2: as many of each class in the memory, and of each class of this experience, as the memory
        has of its smallest class."""
        memory = self.buffer.as_data(learner.source_of(self))
        n = int(memory.labels.unique(return_counts=True)[1].min())
        both = None
        for data in (memory, experience.train):
            order = torch.randperm(len(data), generator=learner.generator)
            labels = data.labels[order]
            part = data.select(torch.cat([order[labels == c][:n] for c in labels.unique()]))
            both = part if both is None else both + part
        batch = both.fetch(torch.arange(len(both)))
        return TensorData({**batch, ROW: torch.arange(len(both))})

    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        if stage.name == "classifier":
            assert stage.data is not None
            self.features = learner.features(stage.data)
            self.expanded(learner).classifier.reset_parameters()

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.features = None

    # -- the step -------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        expanded = self.expanded(learner)
        if self.features is not None and ROW in batch:
            features = self.features[batch[ROW]]
        else:
            with torch.no_grad():
                earlier = [backbone(batch) for backbone in expanded.earlier]
            features = torch.cat([*earlier, run(batch).features], 1)
        return Output(learner.mask_tasks(expanded.classifier(features), batch["task_labels"]), features)

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor | None:
        if ROW not in batch:
            return None
        logits = torch.where(output.logits > MASKED / 2, output.logits / self.temperature, output.logits)
        return learner.task_loss(batch, Output(logits, output.features))

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if ROW in batch or len(learner.seen) == 1:
            return {}
        expanded, classes = self.expanded(learner), learner.seen[-1].classes
        target = torch.full((learner.n_classes,), len(classes), device=output.features.device)
        target[list(classes)] = torch.arange(len(classes), device=target.device)
        logits = expanded.auxiliary(output.features[:, -expanded.feature_size :])
        return {"auxiliary": self.auxiliary * F.cross_entropy(logits, target[batch["labels"]])}

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        add_herded(self.buffer, experience.train, learner.features(experience.train), learner.generator)

    # -- bookkeeping ----------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra, **self.buffer.cost()}

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
