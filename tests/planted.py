"""Strategies that are wrong in one way each, as published code bases have been, and the check that must see it."""

from __future__ import annotations

import copy
import time
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.data import concat
from clplatform.memory.buffer import Buffer, append
from clplatform.regularization.quadratic import Quadratic
from clplatform.strategy.base import Run, Strategy
from clplatform.strategy.replay import Replay
from clplatform.types import MASKED, Batch, Data, Experience, ExperienceInfo, Output

PLANTED: dict[str, str] = {}  # class → check


def caught_by(check: str) -> Any:
    def note(cls: type) -> type:
        PLANTED[cls.__name__] = check
        return cls

    return note


# -- regularization ----------------------------------------------------------------------------------------------------


class Right(Strategy):
    """A quadratic penalty by the squared gradients of single samples, as it should be."""

    family = "regularization"
    needs = frozenset({"boundaries"})

    def __init__(self) -> None:
        self.quadratic = Quadratic()

    def loss(self, learner: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"right": 50 * self.quadratic.penalty(learner)} if len(self.quadratic) else {}

    def importance(self, learner: Any, data: Data) -> dict[str, Tensor]:
        named = {n: p for n, p in learner.named_parameters() if p.requires_grad}
        total = {n: torch.zeros_like(p) for n, p in named.items()}
        for batch in learner.batches(data):
            losses = F.cross_entropy(learner(batch).logits, batch["labels"], reduction="none")
            for loss in losses:
                found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
                for n, g in zip(named, found, strict=True):
                    total[n] += g**2 / len(data) if g is not None else 0
        return total

    def after_experience(self, learner: Any, experience: Experience) -> None:
        modes = {m: m.training for m in learner.modules()}
        learner.eval()
        found = self.importance(learner, experience.train)
        for module, mode in modes.items():
            module.training = mode
        self.quadratic.add(found, {n: p.detach().clone() for n, p in learner.named_parameters()})

    def cost(self) -> dict[str, int | float]:
        return self.quadratic.cost()

    def state_dict(self) -> dict[str, Any]:
        return self.quadratic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quadratic.load_state_dict(state)


@caught_by("acts")
class PenaltyOfZero(Right):
    """The penalty is zero for ever (Avalanche #1099)."""

    def importance(self, learner: Any, data: Data) -> dict[str, Tensor]:
        return {n: torch.zeros_like(v) for n, v in super().importance(learner, data).items()}


@caught_by("batch_size_of_passes")
class BatchedFisher(Right):
    """The square of a batch's mean gradient in place of the mean of squares (Avalanche #1224)."""

    def importance(self, learner: Any, data: Data) -> dict[str, Tensor]:
        named = {n: p for n, p in learner.named_parameters() if p.requires_grad}
        total = {n: torch.zeros_like(p) for n, p in named.items()}
        for batch in learner.batches(data):
            loss = F.cross_entropy(learner(batch).logits, batch["labels"])
            for n, g in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
                total[n] += g**2 * len(batch["labels"]) / len(data) if g is not None else 0
        return total


@caught_by("leaves_the_model_as_it_was")
class BatchNormDrift(Right):
    """The importance pass runs in training mode, and batch norm learns from it (Avalanche #723)."""

    def after_experience(self, learner: Any, experience: Experience) -> None:
        learner.train()
        self.quadratic.add(
            self.importance(learner, experience.train), {n: p.detach().clone() for n, p in learner.named_parameters()}
        )


@caught_by("leaves_the_model_as_it_was")
class LeavesEvalMode(Right):
    def after_experience(self, learner: Any, experience: Experience) -> None:
        super().after_experience(learner, experience)
        learner.eval()


@caught_by("resumes")
class LostFisher(Right):
    """The Fisher information is a plain attribute that no checkpoint holds (Mammoth)."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Amnesiac(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None: ...


@caught_by("resumes")
class OptimizerNotRestored(Right):
    """The optimizer is saved and never restored (Mammoth)."""

    def optimizer(self, learner: Any) -> torch.optim.Optimizer:
        return Amnesiac(learner.parameter_groups(), lr=0.1, momentum=0.9)


@caught_by("resumes")
class OptimizerOfItsOwn(Right):
    """A second optimizer, whose momentum no checkpoint holds."""

    def before_experience(self, learner: Any, experience: Experience) -> None:
        self.second = torch.optim.SGD(learner.backbone.parameters(), lr=0.01, momentum=0.9)

    def after_step(self, learner: Any) -> None:
        self.second.step()


@caught_by("resumes")
class ResumesBetweenExperiencesOnly(Right):
    """A generator that is right at the start of every experience, and begins anew in the middle of one (Avalanche)."""

    def before_experience(self, learner: Any, experience: Experience) -> None:
        self.generator = torch.Generator().manual_seed(experience.index)

    def edit_gradients(self, learner: Any) -> None:
        for p in learner.parameters():
            if p.grad is not None:
                p.grad += 0.01 * torch.randn(p.shape, generator=self.generator)


@caught_by("state")
class PickledModule(Right):
    """Objects in a checkpoint, which only unpickling brings back (CLArena)."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "model": nn.Linear(2, 2)}


@caught_by("cost")
class ForgetsItsCost(Right):
    def cost(self) -> dict[str, int | float]:
        return {}


@caught_by("cost")
class ForgetsItsOwners(Right):
    """A whole number for each weight is a cost, too."""

    def build(self, learner: Any, info: ExperienceInfo) -> None:
        self.owners = [torch.zeros_like(p, dtype=torch.int16) for p in learner.backbone.parameters()]


@caught_by("cost")
class ForgetsItsMasks(Right):
    """The same in the model."""

    def build(self, learner: Any, info: ExperienceInfo) -> None:
        if "masks" not in learner.extras:
            learner.extras["masks"] = nn.Module()
            learner.extras["masks"].register_buffer("mask", torch.ones_like(learner.backbone.layer.weight) > 0)


@caught_by("finite")
class NotFinite(Right):
    """The square root's gradient at zero."""

    def loss(self, learner: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        return (
            {"norm": (self.quadratic.penalty(learner) - self.quadratic.constant).sqrt()}
            if self.quadratic.weight
            else {}
        )


@caught_by("declares")
class UnknownNeed(Right):
    needs = frozenset({"boundary"})


@caught_by("first_experience")
class DrawsFromTheGlobalGenerator(Right):
    """Whatever it draws there, dropout does not."""

    def extend_batch(self, learner: Any, batch: Batch) -> Batch:
        torch.rand(1)
        return batch


@caught_by("reproducible")
class DrawsFromTheClock(Right):
    first_experience_is_finetuning: ClassVar[bool] = False
    why_not = "it adds noise"

    def edit_gradients(self, learner: Any) -> None:
        generator = torch.Generator().manual_seed(time.perf_counter_ns())
        for p in learner.parameters():
            if p.grad is not None:
                p.grad += 0.01 * torch.randn(p.shape, generator=generator)


# -- distillation ------------------------------------------------------------------------------------------------------


@caught_by("teachers")
class TeacherInTrainingMode(Strategy):
    family = "distillation"
    needs = frozenset({"boundaries"})
    teacher: nn.Module | None = None

    def before_experience(self, learner: Any, experience: Experience) -> None:
        if experience.index > 0:
            self.teacher = copy.deepcopy(learner.backbone).requires_grad_(False)

    def loss(self, learner: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"old": F.mse_loss(output.features, self.teacher(batch))} if self.teacher is not None else {}


@caught_by("composes")
class CountsOnTheSizeOfTheBatch(TeacherInTrainingMode):
    """Replayed rows beside the stream's are not expected."""

    def before_experience(self, learner: Any, experience: Experience) -> None:
        super().before_experience(learner, experience)
        if self.teacher is not None:
            self.teacher.eval()

    def loss(self, learner: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        assert len(batch["labels"]) <= 8
        return super().loss(learner, batch, output)


@caught_by("learns_text")
class OnlyImages(CountsOnTheSizeOfTheBatch):
    """`batch["pixel_values"]` in place of the batch (Avalanche #1128, #1248)."""

    def loss(self, learner: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        return super().loss(learner, {"labels": batch["labels"], "pixel_values": batch["pixel_values"]}, output)


# -- which classes are new ---------------------------------------------------------------------------------------------


@caught_by("learns")
class MasksOldClasses(Strategy):
    """Earlier experiences' classes are kept out of the loss, also where they come back."""

    family = "baseline"

    def task_loss(self, learner: Any, batch: Batch, output: Output) -> Tensor:
        logits = output.logits.clone()
        logits[:, : learner.n_old_classes] = MASKED
        return F.cross_entropy(logits, batch["labels"])


@caught_by("learns_without_boundaries")
class TakesOldClassesForReplayed(Strategy):
    """In a class-incremental stream, rows of earlier classes are taken for a memory's, and left to another loss."""

    family = "baseline"

    def task_loss(self, learner: Any, batch: Batch, output: Output) -> Tensor:
        new = batch["labels"] >= learner.n_old_classes
        if learner.info.scenario != "class_incremental":
            new[:] = True
        losses = F.cross_entropy(output.logits, batch["labels"], reduction="none")
        return (losses * new).sum() / new.sum().clamp_min(1)


# -- what it reads -----------------------------------------------------------------------------------------------------


@caught_by("reads_only_what_it_may")
class ChoosesOnTestData(Right):
    """ "Best" is chosen on the test set (LibContinual)."""

    def after_experience(self, learner: Any, experience: Experience) -> None:
        super().after_experience(learner, experience)
        learner.features(experience.test)


@caught_by("reads_only_what_it_may")
class KeepsAllData(Right):
    """Earlier data without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.earlier: list[Data] = []

    def train_data(self, learner: Any, experience: Experience, data: Data) -> Data:
        self.earlier.append(data)
        for other in self.earlier[:-1]:
            data = data + other
        return data


@caught_by("task_ids_stay_hidden")
class UsesHiddenTaskIds(Right):
    first_experience_is_finetuning: ClassVar[bool] = False
    why_not = "it shifts logits"

    def forward(self, learner: Any, batch: Batch, run: Run) -> Output:
        output = run(batch)
        return Output(
            output.logits + 0.1 * batch["task_labels"][:, None] * output.logits.detach().sign(), output.features
        )


@caught_by("predicts_when_loaded")
class PredictsFromItsState(Strategy):
    """What predictions need is in the state, which a saved model does not have."""

    family = "prototype"
    first_experience_is_finetuning: ClassVar[bool] = True

    def __init__(self) -> None:
        self.means: Tensor | None = None

    def after_experience(self, learner: Any, experience: Experience) -> None:
        features, labels = learner.features(experience.train), experience.train.labels
        new = torch.stack([features[labels == k].mean(0) for k in experience.classes])
        self.means = (
            new if self.means is None or len(experience.classes) == learner.n_classes else torch.cat([self.means, new])
        )

    def forward(self, learner: Any, batch: Batch, run: Run) -> Output:
        output = run(batch)
        if learner.training or self.means is None:
            return output
        return Output(-torch.cdist(output.features, self.means), output.features)

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = state["means"]


@caught_by("classes_come_back")
class NewRowsForOldClasses(Strategy):
    """A revisited class is given a classifier of its own again."""

    family = "expansion"
    first_experience_is_finetuning: ClassVar[bool] = False
    why_not = "every experience has a classifier of its own"

    def build(self, learner: Any, info: ExperienceInfo) -> None:
        name = f"head_{info.index}"
        if name not in learner.extras:
            learner.extras[name] = nn.Linear(learner.backbone.feature_size, len(info.classes))

    def forward(self, learner: Any, batch: Batch, run: Run) -> Output:
        features = run(batch).features
        return Output(torch.cat([head(features) for head in learner.extras.values()], 1), features)


# -- memory ------------------------------------------------------------------------------------------------------------


class Vitter(Buffer):
    """Vitter's reservoir, one sample after the other."""

    shift = 0

    def add(self, batch: Batch, generator: torch.Generator, rank: Tensor | None = None) -> None:
        for i in range(len(batch["labels"])):
            row = {n: v[i : i + 1] for n, v in batch.items()}
            self.n_seen += 1
            if len(self) < self.capacity:
                place = len(self)
                self.keys = torch.zeros(place + 1, dtype=torch.float64)
            else:
                place = int(torch.randint(self.n_seen + self.shift, (1,), generator=generator))
            if place < self.capacity:
                self._write(torch.tensor([place]), row)


class OneTooFew(Vitter):
    shift = -1


class OneTooMany(Vitter):
    shift = 1


class ReplayOf(Replay):
    """Replay with another buffer, filled batch by batch."""

    buffer_class: ClassVar[type[Buffer]] = Vitter
    first_experience_is_finetuning: ClassVar[bool] = False
    why_not = "it replays from the second batch on"

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity, batch_size=None, policy="reservoir", update="batch", device="cpu")
        self.buffer = self.buffer_class(capacity=capacity)


@caught_by("memory_is_uniform")
class ReservoirOneTooFew(ReplayOf):
    """The reservoir draws from one number too few (Renate's is off by one)."""

    buffer_class = OneTooFew


@caught_by("memory_is_uniform")
class ReservoirOneTooMany(ReplayOf):
    buffer_class = OneTooMany


class Latest(Vitter):
    def add(self, batch: Batch, generator: torch.Generator, rank: Tensor | None = None) -> None:
        super().add(batch, generator, rank)
        self.n_seen = 0


@caught_by("memory_is_uniform")
class ForgetsHowManyItSaw(ReplayOf):
    buffer_class = Latest


@caught_by("memory")
class StoresWhatItReplays(ReplayOf):
    """Replayed rows compete for a place again."""

    def after_batch(self, learner: Any, batch: Batch, output: Output) -> None:
        if learner.current_epoch == 0:
            self.buffer.add({n: v for n, v in batch.items() if n != "source"}, learner.generator)


class Endless(Vitter):
    def add(self, batch: Batch, generator: torch.Generator, rank: Tensor | None = None) -> None:
        capacity, self.capacity = self.capacity, self.capacity + len(self) + len(batch["labels"])
        self.rows = {n: torch.cat([v, v.new_zeros(self.capacity - len(v), *v.shape[1:])]) for n, v in self.rows.items()}
        super().add(batch, generator, rank)
        self.capacity = capacity


@caught_by("memory")
class GrowsWithoutEnd(ReplayOf):
    """More than its capacity."""

    buffer_class = Endless


@caught_by("memory")
class MixesUpLabels(Replay):
    """Stored labels belong to other samples."""

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity, batch_size=None, policy="reservoir", update="experience", device="cpu")

    def after_experience(self, learner: Any, experience: Experience) -> None:
        super().after_experience(learner, experience)
        self.buffer.rows["labels"] = self.buffer.rows["labels"].flip(0)


class Cutting(Buffer):
    def _write(self, places: Tensor, rows: Batch) -> None:
        super()._write(places, {n: v[:, :4] if v.ndim == 2 else v for n, v in rows.items()})


@caught_by("memory_of_text")
class CutsTexts(ReplayOf):
    """Texts longer than the first ones are cut."""

    buffer_class = Cutting


@caught_by("resumes")
class ReseedsItsGenerator(Replay):
    """The buffer's generator begins anew when a run is resumed (Renate)."""

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity, batch_size=None, policy="reservoir", update="experience", device="cpu")
        self.generator = torch.Generator().manual_seed(0)

    def extend_batch(self, learner: Any, batch: Batch) -> Batch:
        ours, learner.generator = learner.generator, self.generator
        batch = super().extend_batch(learner, batch)
        learner.generator = ours
        return batch


@caught_by("resumes")
class GrowsBesideItsState(Replay):
    """A memory that grows by one sample at a time, outside of the state."""

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity, batch_size=None, policy="reservoir", update="experience", device="cpu")
        self.samples: list[Batch] = []

    def extend_batch(self, learner: Any, batch: Batch) -> Batch:
        return append(batch, concat(self.samples), learner.source_of(self)) if self.samples else batch

    def after_experience(self, learner: Any, experience: Experience) -> None:
        for i in range(10):
            self.samples.append(experience.train.fetch(torch.tensor([i])))


@caught_by("takes_updates")
class CountsWhatIsToCome(Right):
    """What is important follows from how many classes there will be."""

    def importance(self, learner: Any, data: Data) -> dict[str, Tensor]:
        return {
            name: value / len(learner.info.class_names) for name, value in super().importance(learner, data).items()
        }


@caught_by("evaluates_what_is_there")
class RemembersTooMuch(Right):
    """The features of test data are kept although the backbone is trained on."""

    def forward(self, learner: Any, batch: Batch, run: Run) -> Output:
        return run(batch if learner.training else {**batch, "features": learner.frozen_features(batch)})
