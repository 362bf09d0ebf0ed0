"""What tests of strategies with averaged models share: the average written out, a training loop that tells of its
steps, and an optimizer step that is skipped."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive import Loss, Model
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor

from clplatform.fitting import Fitter
from clplatform.strategy.base import Strategy
from clplatform.types import Batch, Output


class Follower:
    """θ̄ ← α θ̄ + (1 − α) θ with α at most 1 − 1/(t+1), written out over a plain model."""

    def __init__(self, model: Model, decay: float, *, warm_up: bool = True) -> None:
        self.model, self.decay, self.warm_up = copy.deepcopy(model), decay, warm_up

    def grow(self, model: Model, start: dict[str, Tensor]) -> None:
        self.model.grow(start)

    def update(self, model: Model, t: int) -> None:
        decay = min(1 - 1 / (t + 1), self.decay) if self.warm_up else self.decay
        with torch.no_grad():
            for a, p in zip(self.model.parameters(), model.parameters(), strict=True):
                a.copy_(decay * a + (1 - decay) * p)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


def train(model: Model, batches: list[Batch], loss: Loss, *, before: Callable[[], None], after: Callable[[], None]):
    """As `naive.train`, and told before and after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch, model(batch["pixel_values"])).backward()
        before()
        optimizer.step()
        after()


def averaged(average: Any) -> dict[str, Tensor]:
    """An average's weights under the learner's names."""
    return {name: tensor.clone() for name, tensor in average.state_dict().items()}


def close(model: Model, average: Any) -> None:
    """The average is the plain model, up to rounding."""
    found = averaged(average)
    assert model.named().keys() == found.keys()
    for name, value in model.named().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Breaks(Strategy):
    """Makes the gradient of one batch infinite, and keeps copies of averages after every batch."""

    def __init__(self, batch: int, averages: Callable[[Any], list[Any]]) -> None:
        self.batch, self.averages, self.count = batch, averages, 0
        self.seen: list[list[dict[str, Tensor]]] = []

    def loss(self, learner: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        self.count += 1
        return {"breaks": output.logits.sum() * (float("inf") if self.count == self.batch else 0.0)}

    def after_batch(self, learner: Any, batch: Batch, output: Output) -> None:
        self.seen.append([averaged(average) for average in self.averages(learner)])


class Scaled(MixedPrecision):
    """The loss scaling of float16, in float32."""

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


def scale_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trainer scales the loss from now on, and skips a step whose gradient is not finite."""
    trainer_of = Fitter.make_trainer

    def make_trainer(self: Fitter, *args: Any) -> Any:
        trainer = trainer_of(self, *args)
        trainer.strategy.precision_plugin = Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
        return trainer

    monkeypatch.setattr(Fitter, "make_trainer", make_trainer)
