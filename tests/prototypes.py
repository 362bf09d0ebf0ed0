"""What tests of strategies on frozen features share: streams, features by hand, and what all of them must keep to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from world import DIM, TinyBackbone, TinyStream, make_experiment, same, weights

from clplatform.results import Results
from clplatform.strategy.base import Strategy
from clplatform.types import Batch

Make = Callable[[], Strategy]


class NormBackbone(TinyBackbone):
    """With batch normalisation and dropout: what it answers depends on its mode, and a training pass changes it."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.norm = nn.BatchNorm1d(DIM)
        self.rows: list[int] = []  # that passed through it, pass by pass

    def forward(self, batch: Batch) -> Tensor:
        self.rows.append(len(batch["pixel_values"]))
        x = self.norm(batch["pixel_values"].flatten(1))
        return self.dropout(self.layer(x).tanh())


def norm_backbone() -> NormBackbone:
    torch.manual_seed(5)
    backbone = NormBackbone()
    nn.init.normal_(backbone.norm.weight)
    backbone.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    backbone.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return backbone


def unbalanced(scenario: str = "class_incremental") -> TinyStream:
    """Classes that overlap and differ in size."""
    stream = TinyStream(scenario=scenario, noise=1.5)
    for i, e in enumerate(stream.experiences):
        rows = torch.arange(len(e.train))
        kept = (e.train.labels % 2 == 0) | (rows % (i + 2) != 1)
        stream.experiences[i] = replace(e, train=e.train.select(rows[kept]))
    return stream


def joined(stream: Any, split: str = "train") -> Batch:
    """All samples of all experiences in one batch."""
    batches = [getattr(e, split).fetch(torch.arange(len(getattr(e, split)))) for e in stream]
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


@torch.no_grad()
def features_of(learner: Any, batch: Batch) -> Tensor:
    """tanh(Wx + b) of the tiny backbone, in float64."""
    layer = learner.backbone.layer
    return (batch["pixel_values"].flatten(1).double() @ layer.weight.double().T + layer.bias.double()).tanh()


@torch.no_grad()
def answers(learner: Any, batch: Batch) -> Tensor:
    """Logits in eval mode, on a batch of test samples."""
    return learner.eval()(batch).logits


def run(folder: Path, strategy: Strategy, **options: Any) -> Any:
    """A finished run with this strategy alone; its learner."""
    experiment = make_experiment(folder, {"prototype": strategy}, **options)
    experiment.run()
    return experiment.learner


# -- what all of them keep to -----------------------------------------------------------------------------------------


def check_one_pass(folder: Path, make: Make) -> None:
    """Each experience passes through the backbone once, in eval mode and without augmentation; the backbone, its
    statistics and the random numbers that others draw stay as they are."""
    backbone, stream = norm_backbone(), TinyStream()
    experiment = make_experiment(folder, {"prototype": make()}, stream=stream, backbone=backbone, augment=spoil)
    learner, start = experiment.learner, weights(experiment.learner)
    seen = []
    consolidate = learner.chain.after_experience

    def spy(learner: Any, experience: Any) -> None:
        backbone.rows.clear()
        consolidate(learner, experience)
        seen.append(sum(backbone.rows))

    learner.chain.after_experience = spy  # type: ignore[method-assign]
    experiment.run()
    assert seen == [32, 32, 32]
    assert experiment.results.cost["steps"] == experiment.results.cost["samples"] == 0
    own = [name for name in start if name.startswith("backbone.")]
    assert len(own) == 7
    assert same({n: start[n] for n in own}, {n: weights(learner)[n] for n in own})
    plain = run(folder / "plain", make(), backbone=norm_backbone())
    batch = joined(stream, "test")
    assert torch.equal(answers(learner, batch), answers(plain, batch))


def spoil(batch: Batch, generator: torch.Generator) -> Batch:
    """An augmentation that leaves nothing of a sample."""
    return {**batch, "pixel_values": torch.randn(batch["pixel_values"].shape, generator=generator)}


def check_rebuilt(folder: Path, make: Make) -> None:
    """What prediction needs is part of the model: structure from metadata, weights from the model, no state."""
    stream = TinyStream()
    learner = run(folder / "a", make(), stream=stream)
    copy = make_experiment(folder / "b", {"prototype": make()}, stream=stream).learner
    for experience in stream:
        copy.build(experience.info)
        copy.build(experience.info)  # idempotent
    copy.load_state_dict(learner.state_dict())
    batch = joined(stream, "test")
    assert torch.equal(answers(copy, batch), answers(learner, batch))


def check_masks(folder: Path, make: Make) -> None:
    """Where task ids are known the answer is one of the task's classes; untrained classes are never the answer."""
    stream = TinyStream(scenario="task_incremental", noise=3.0)
    learner = run(folder, make(), stream=stream)
    batch = joined(stream, "test")
    logits = answers(learner, batch)
    assert torch.equal(logits.argmax(1) // 2, batch["task_labels"])
    assert ((logits > -5000).sum(1) == 2).all()
    stream.info = replace(stream.info, task_ids=False)
    learner = make_experiment(folder / "b", {"prototype": make()}, stream=stream).learner
    for e in stream.experiences[:2]:
        learner.build(e.info)
        if e.index == 0:  # before anything is known the head answers, as in every other strategy
            with torch.no_grad():
                assert torch.equal(answers(learner, batch), learner.run(batch).logits)
            learner.chain.after_experience(learner, e)
    assert ((answers(learner, batch) > -5000).nonzero()[:, 1] < 2).all()


def check_broken_off(folder: Path, make: Make) -> None:
    """A run that breaks off when the statistics hold an experience that no checkpoint holds yet counts it once."""

    class Killed(Exception):
        pass

    def experiment(name: str) -> Any:
        return make_experiment(folder / name, {"prototype": make()}, stream=unbalanced(), dropout=0.2)

    whole, broken = experiment("whole"), experiment("broken")
    whole.run()
    save = broken._save

    def kill(name: str, index: int, stage: int) -> None:
        if index == 2:
            raise Killed
        save(name, index, stage)

    broken._save = kill
    with pytest.raises(Killed):
        broken.run()
    resumed = experiment("broken")
    resumed.results = Results.load(folder / "broken")
    resumed.run(resume=True)
    assert resumed.results.matrix == whole.results.matrix
    assert same(weights(resumed.learner), weights(whole.learner))
