"""What hand-written training loops share: a plain PyTorch model, and a record of the batches that a run saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from world import make_experiment, weights

from clplatform.memory.buffer import Buffer
from clplatform.strategy.base import Strategy
from clplatform.types import Batch, Experience

Loss = Callable[["Model", Batch, Tensor], Tensor]


class Recorder(Strategy):
    """Writes down the weights before each experience, the batches as they stand at its place in the chain, and the
    weights after each experience."""

    family = "observer"  # none of those that a strategy may exclude

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.batches: list[list[Batch]] = []
        self.after: list[dict[str, Tensor]] = []

    def before_experience(self, learner: Any, experience: Experience) -> None:
        self.before.append(weights(learner))
        self.batches.append([])

    def extend_batch(self, learner: Any, batch: Batch) -> Batch:
        self.batches[-1].append(batch)
        return batch

    def after_experience(self, learner: Any, experience: Experience) -> None:
        self.after.append(weights(learner))


class Model(nn.Module):
    """The tiny world's model written out: logits = V tanh(Wx + b) + c."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(start["backbone.layer.weight"].shape[1], start["backbone.layer.weight"].shape[0])
        self.head = nn.Linear(start["head.linear.weight"].shape[1], start["head.linear.weight"].shape[0])
        self.load_state_dict(
            {
                "layer.weight": start["backbone.layer.weight"],
                "layer.bias": start["backbone.layer.bias"],
                "head.weight": start["head.linear.weight"],
                "head.bias": start["head.linear.bias"],
            }
        )

    def grow(self, start: dict[str, Tensor]) -> None:
        """Take over the new rows of a head, and nothing else."""
        old = self.head
        self.head = nn.Linear(old.in_features, len(start["head.linear.bias"]))
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([old.weight, start["head.linear.weight"][old.out_features :]]))
            self.head.bias.copy_(torch.cat([old.bias, start["head.linear.bias"][old.out_features :]]))

    def features(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def named(self) -> dict[str, Tensor]:
        """Weights under the learner's names."""
        return {
            "backbone.layer.weight": self.layer.weight.detach(),
            "backbone.layer.bias": self.layer.bias.detach(),
            "head.linear.weight": self.head.weight.detach(),
            "head.linear.bias": self.head.bias.detach(),
        }


class Memory:
    """A reservoir written out, beside a buffer: every visit with its key, of which the smallest keys stay.

    What the buffer draws is drawn here too, after it was checked to be here.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.capacity = buffer.capacity
        self.keys: list[float] = []  # of every visit, in the order of arrival
        self.index: list[int] = []  # the sample that a visit was of
        self.draws: list[list[int]] = []  # visits drawn, draw by draw
        self.sizes: list[int] = []  # visits that had arrived when a draw was made
        self._add, self._sample = buffer.add, buffer.sample
        buffer.add, buffer.sample = self.add, self.sample  # type: ignore[method-assign]

    def add(self, batch: Batch, generator: torch.Generator) -> None:
        twin = torch.Generator()
        twin.set_state(generator.get_state())
        n = len(batch["labels"])
        visit = torch.arange(len(self.keys), len(self.keys) + n)
        self.keys += torch.rand(n, generator=twin, dtype=torch.float64).tolist()
        self.index += batch["index"].tolist()
        self._add({**batch, "visit": visit}, generator)

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        rows = self._sample(n, generator)
        self.draws.append(rows.pop("visit").tolist())
        self.sizes.append(len(self.keys))
        return rows

    def stored(self, n_visits: int) -> set[int]:
        """The visits that a reservoir holds after so many."""
        return set(sorted(range(n_visits), key=lambda v: self.keys[v])[: self.capacity])

    def check(self, n: int) -> None:
        """Every draw was of min(n, stored) different visits that a reservoir held at that time."""
        for draw, size in zip(self.draws, self.sizes, strict=True):
            stored = self.stored(size)
            assert len(set(draw)) == len(draw) == min(n, len(stored))
            assert set(draw) <= stored


def samples(stream: Any) -> dict[int, tuple[Tensor, int]]:
    """Every training sample by its index."""
    found = {}
    for experience in stream:
        batch = experience.train.fetch(torch.arange(len(experience.train)))
        for i, x, y in zip(batch["index"], batch["pixel_values"], batch["labels"], strict=True):
            found[int(i)] = x, int(y)
    return found


def cross_entropy(model: Model, batch: Batch, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, batch["labels"])


def train(model: Model, batches: list[Batch], loss: Loss = cross_entropy) -> None:
    """SGD with momentum from a fresh state, as `world.make_learner` has it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch, model(batch["pixel_values"])).backward()
        optimizer.step()


def run(folder: Path, name: str, strategy: Strategy, *, last: bool = False, **options: Any) -> tuple[Any, Recorder]:
    """A run in the tiny world with a recorder before (or after, `last`) the strategy."""
    recorder = Recorder()
    pair: list[tuple[str, Strategy]] = [("recorder", recorder), (name, strategy)]
    experiment = make_experiment(folder, dict(reversed(pair) if last else pair), **options)
    experiment.run()
    return experiment, recorder


def close(model: Model, learner: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """The weights of both are equal up to rounding."""
    expected, found = model.named(), weights(learner)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
