"""A model averaged over training: the exponential moving average of a learner's weights.

    θ̄_t = α_t θ̄_{t−1} + (1 − α_t) θ_t,  α_t = min(1 − 1/(t+1), α)

(Tarvainen & Valpola 2017, Section 2; α_t as in their code.) The first average is the mean of what there was so far, which
soon forgets the initial weights. Statistics of batch norm are averaged like weights; what is no number is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clplatform.head.span import close_places
from clplatform.head.vocabulary import answer
from clplatform.types import Batch, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Average(nn.Module):
    """Copies of a learner's backbone and head that follow them, always in eval mode and never trained.

    In `learner.extras` it is moved and saved with the model; elsewhere whoever holds it does that.
    """

    backbone: Any
    head: Any

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.backbone, self.head = _copy(learner.backbone), _copy(learner.head)

    def train(self, mode: bool = True) -> Average:
        """Stays in eval mode, whatever the model around it does."""
        return super().train(False)

    @property
    def frozen(self) -> list[nn.Module]:
        """All of it: no stage may train it."""
        return list(self.modules())

    @torch.no_grad()
    def grow(self, learner: Learner) -> None:
        """Take over a head that has grown: old rows keep their average, new rows are the learner's."""
        old, self.head = self.head.state_dict(), _copy(learner.head)
        for name, value in self.head.state_dict().items():
            if name in old:
                value[tuple(slice(0, n) for n in old[name].shape)] = old[name].to(value.device)

    @torch.no_grad()
    def update(self, learner: Learner, decay: float) -> None:
        """One step of the average, after the optimizer's step number `learner.steps` (t)."""
        decay = min(1 - 1 / (learner.steps + 1), decay)
        pairs = [p for ours, theirs in self._parts(learner) for p in zip(_tensors(ours), _tensors(theirs), strict=True)]
        numbers = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in numbers], [b for _, b in numbers], 1 - decay)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)

    def _parts(self, learner: Learner) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.backbone, learner.backbone), (self.head, learner.head)]

    @torch.no_grad()
    def forward(self, learner: Learner, batch: Batch) -> Output:
        """The averaged model as the strategies wrap it. Logits [B, K], features [B, D], without gradients."""
        return learner.chain.forward(learner, batch, lambda inputs: self._run(learner, inputs))

    def _run(self, learner: Learner, batch: Batch) -> Output:
        features = self.backbone(batch)
        logits = answer(self.backbone, self.head, features, batch["task_labels"])
        return Output(close_places(batch, learner.mask_tasks(logits, batch["task_labels"])), features)

    @contextmanager
    def in_place_of(self, learner: Learner) -> Iterator[None]:
        """Inside, the learner's backbone and head are these."""
        before = learner.backbone, learner.head
        learner.backbone, learner.head = self.backbone, self.head
        try:
            yield
        finally:
            learner.backbone, learner.head = before

    def n_floats(self) -> int:
        """Numbers that it holds."""
        return sum(t.numel() for t in self.state_dict().values() if t.is_floating_point())


def _copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False).eval()


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once (tied weights)."""
    return [*module.parameters(), *module.buffers()]
