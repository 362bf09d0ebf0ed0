"""Bias correction (Wu et al. 2019, "Large Scale Incremental Learning", Eq. 1–5).

    stage 1:  L = λ L_d + (1 − λ) ℓ(f(x), y),  λ = n / (n + m)
              L_d = T-softened KL( softmax(ô/T) ‖ softmax(o/T) ) over the n old classes
    stage 2:  q_k = o_k for old classes, α o_k + β for the m new ones;  L = ℓ(q(x), y) over α and β alone

ô are the logits of the model before this experience, as corrected then (frozen, in eval mode), T is 2, and as in the
paper there is no factor T²; KL has the gradient of the paper's cross-entropy. Both stages see the earlier corrections:
each experience has its α and β, which stay, and all logits are corrected, in training too. Stage 2 is trained on samples
that no stage 1 has seen: a share of what the memory holds of each old class, and as many samples of each new class, held
out from its training data. Logits are computed once for it, in eval mode and without augmentation. (The authors' code
adds 0.1 · β²/2 to its loss.)

The memory gives each class an equal share, of which ⌈`held_out` · share⌉ samples are the held-out ones; which samples is
random, and when shares shrink the first of both kinds stay. Stage 1 is trained on the new data and the memory's other
samples together. The first experience has one stage, on the data without what is held out.

"Old" are the classes that the current experience does not have; without any (a domain-incremental stream) this is
replay of equal shares. Where task ids are known, distillation acts on the classes of a sample's own task.

Costs `capacity` stored samples, which lengthen every epoch, a copy of the model with one forward pass of it in each step
from the second experience on, two numbers for each class, and `epochs` passes over the held-out samples' logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.data import TensorData
from clplatform.memory.buffer import Buffer
from clplatform.memory.held_out import draw_held_out, n_held_out, ranked
from clplatform.strategy.base import Run, Strategy
from clplatform.types import MASKED, Batch, Data, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner
    from clplatform.teacher import Teacher

ROW = "bic_row"  # the column that marks the samples of stage 2: their place among its logits


class BiasCorrection(nn.Module):
    """Logits [B, K] → corrected ones: by all earlier layers, which are one line for each class, and the current one."""

    scale: Tensor  # [K]: of the earlier layers together
    shift: Tensor  # [K]
    current: Tensor  # [K]: is it a class of the latest experience? Metadata alone tells it, so it is not saved.

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.requires_grad_(False)  # only stage 2 trains them
        self.register_buffer("scale", torch.ones(0))
        self.register_buffer("shift", torch.zeros(0))
        self.register_buffer("current", torch.zeros(0, dtype=torch.bool), persistent=False)

    def grow(self, info: ExperienceInfo) -> None:
        n = max(0, info.n_seen_classes - len(self.scale))
        self.scale, self.shift = F.pad(self.scale, (0, n), value=1.0), F.pad(self.shift, (0, n))
        self.current = torch.zeros_like(self.scale, dtype=torch.bool)
        self.current[list(info.classes)] = True

    def forward(self, logits: Tensor) -> Tensor:
        earlier = logits * self.scale + self.shift
        return self.latest(torch.where(logits > MASKED / 2, earlier, logits))

    def latest(self, logits: Tensor) -> Tensor:
        """The current layer alone."""
        corrected = (logits > MASKED / 2) & self.current
        return torch.where(corrected, self.alpha * logits + self.beta, logits)

    @torch.no_grad()
    def fold(self) -> None:
        """Make the current layer one of the earlier ones."""
        alpha, beta = (torch.where(self.current, x, y) for x, y in ((self.alpha, 1.0), (self.beta, 0.0)))
        self.scale, self.shift = alpha * self.scale, alpha * self.shift + beta
        self.alpha.fill_(1)
        self.beta.fill_(0)


class BiC(Strategy):
    """Replay with distillation, and a correction of the new classes' logits that is trained on held-out samples.

    Args:
        capacity: samples in the memory, of all classes and of both kinds together.
        held_out: share of the memory, and so of the new classes' samples, that only stage 2 is trained on.
        temperature: T.
        epochs: of stage 2.
        lr: learning rate of stage 2, with the run's optimizer and schedule.
    """

    family = "replay"
    needs = frozenset({"boundaries", "memory"})
    excludes = frozenset({"baseline", "replay", "distillation", "expansion"})
    first_experience_is_finetuning = False
    why_not = "it holds out a part of each experience's data and has a memory and a distillation of its own"

    def __init__(
        self,
        *,
        capacity: Annotated[int, Ge(1)],
        held_out: Annotated[float, Gt(0), Lt(1)],
        temperature: Annotated[float, Gt(0)],
        epochs: Annotated[int, Ge(1)],
        lr: Annotated[float, Gt(0)],
    ) -> None:
        self.buffer = Buffer(capacity=capacity, policy="class_balanced")
        self.held_out, self.temperature, self.epochs, self.lr = held_out, temperature, epochs, lr
        self.teacher: Teacher | None = None
        self.held = torch.zeros(0, dtype=torch.int64)  # positions of this experience's held-out samples
        self.frozen: Output | None = None  # during stage 2: what the model gave for its samples before it
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if "bic" not in learner.extras:
            learner.extras["bic"] = BiasCorrection().to(learner.device)
        self.correction(learner).grow(info)
        self.extra = 2 * (info.n_seen_classes + 1)

    @staticmethod
    def correction(learner: Learner) -> Any:
        return learner.extras["bic"]

    # -- data and stages ------------------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.teacher = learner.snapshot() if experience.index > 0 else None
        self.held = draw_held_out(experience.train.labels, self.n_each(learner), learner.generator)

    def n_each(self, learner: Learner) -> int:
        """Samples of each class in stage 2: as many as the memory holds out when it has this experience's classes too."""
        return n_held_out(self.buffer.capacity // learner.n_classes, self.held_out)

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        assert len(data) == len(experience.train), "no other strategy adds data"
        trained = torch.ones(len(data), dtype=torch.bool)
        trained[self.held] = False
        data = data.select(trained.nonzero()[:, 0])
        if not len(self.buffer):
            return data
        memory = self.buffer.as_data(learner.source_of(self))
        return data + memory.select((~memory.column("held_out")).nonzero()[:, 0])

    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        stages, data = [Stage()], self.validation(learner, experience)
        if data is not None:
            stages.append(Stage("bias", data=data, max_epochs=self.epochs, trainable=r"^extras\.bic\.(alpha|beta)$"))
        return stages

    def validation(self, learner: Learner, experience: Experience) -> TensorData | None:
        """The samples of stage 2: the old classes' held-out ones and as many of the new; None: no class is old."""
        if not len(self.buffer) or not len(self.held):
            return None
        rows, places = self.buffer.as_data(), []
        for c in sorted(set(rows.labels.tolist()) - set(experience.classes)):
            of_class = ((rows.labels == c) & rows.column("held_out")).nonzero()[:, 0]
            places.append(of_class[torch.argsort(self.buffer.keys[of_class])][: self.n_each(learner)])
        if not places:
            return None
        both = rows.select(torch.cat(places)) + experience.train.select(self.held)
        batch = both.fetch(torch.arange(len(both)))
        return TensorData({**batch, ROW: torch.arange(len(both))})

    @torch.no_grad()
    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        if stage.name != "bias":
            return
        assert stage.data is not None
        learner.eval()
        with learner.precision_context():
            found = [learner({n: v for n, v in b.items() if n != ROW}) for b in learner.batches(stage.data)]
        self.frozen = Output(torch.cat([o.logits for o in found]), torch.cat([o.features for o in found]))

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.frozen = None

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        correction = self.correction(learner)
        if not correction.alpha.requires_grad:
            return groups
        return [{"params": [correction.alpha, correction.beta], "lr": self.lr, "weight_decay": 0.0}]

    # -- the step -------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        correction = self.correction(learner)
        if self.frozen is not None and ROW in batch:
            rows = batch[ROW]
            return Output(correction.latest(self.frozen.logits[rows]), self.frozen.features[rows])
        output = run(batch)
        return Output(correction(output.logits), output.features)

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        loss = learner.task_loss(batch, output)
        return loss if ROW in batch else (1 - self.share_of_old(learner)) * loss

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        share = self.share_of_old(learner)
        if share == 0 or ROW in batch:
            return {}
        assert self.teacher is not None
        old = (~self.correction(learner).current).nonzero()[:, 0]
        now, then = output.logits[:, old], self.teacher(batch).logits[:, old]
        return {"distillation": share * divergence(now, then, self.temperature)}

    def share_of_old(self, learner: Learner) -> float:
        """λ"""
        n_new = len(learner.seen[-1].classes)
        return 0.0 if self.teacher is None else 1 - n_new / learner.n_classes

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.correction(learner).fold()
        data = experience.train
        held = torch.zeros(len(data), dtype=torch.bool)
        held[self.held] = True
        rank = ranked(data.labels, held, self.held_out, learner.generator)
        self.buffer.add_ranked(data, rank, learner.generator, held_out=held)

    # -- bookkeeping ----------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        teacher = self.teacher.n_parameters() if self.teacher else 0
        return {"extra_parameters": self.extra + teacher, **self.buffer.cost()}

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of softened logits [B, n], mean over the batch."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
