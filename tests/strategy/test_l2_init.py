"""L2 Init against a hand-written loop and a closed form."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run, train
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.strategy.l2_init import L2Init
from clplatform.types import Batch

STRENGTH = 0.05


def make(strength: float = STRENGTH) -> L2Init:
    strategy = from_page("l2_init", strength=strength)
    assert isinstance(strategy, L2Init)
    return strategy


def learn(recorder: Recorder, mistake: str = "") -> Model:
    """λ Σ (θ − θ_0)²; a new row of the head has its own θ_0."""
    model = Model(recorder.before[0])
    initial = {name: tensor.clone() for name, tensor in model.named().items()}

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        total = F.cross_entropy(logits, batch["labels"])
        for p, start in zip(model.parameters(), initial.values(), strict=True):
            n = len(start) - 2 if mistake == "new rows are free" and len(start) < 16 else len(start)
            total = total + STRENGTH / (2 if mistake == "half" else 1) * ((p[:n] - start[:n]) ** 2).sum()
        return total

    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        if mistake == "back to the last weights":
            initial = {name: tensor.clone() for name, tensor in model.named().items()}
        for name, tensor in initial.items():
            initial[name] = torch.cat([tensor, start[name][len(tensor) :]])
        train(model, batches, loss)
    return model


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, "l2_init", make(), stream=TinyStream(noise=1.5, scenario=scenario))
    close(learn(recorder), experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mistake", ["half", "new rows are free", "back to the last weights"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, "l2_init", make(), stream=TinyStream(noise=1.5))
    with pytest.raises(AssertionError, match="not close"):
        close(learn(recorder, mistake), experiment.learner, rtol=1e-4, atol=1e-5)


def test_weights_that_the_data_does_not_need_drift_back_at_a_known_rate(tmp_path: Path) -> None:
    """Without any other gradient a step of SGD leaves (1 − 2λη) of the distance."""
    strategy, recorder = make(), Recorder()
    experiment = make_experiment(
        tmp_path,
        {"recorder": recorder, "l2_init": strategy},
        stream=TinyStream(1),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    experiment.run()
    learner: Any = experiment.learner
    weight, start = learner.backbone.layer.weight, recorder.before[0]["backbone.layer.weight"]
    assert torch.equal(strategy.initial["backbone.layer.weight"], start)
    gap = weight.detach() - start
    assert gap.abs().max() > 1e-3
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        strategy.loss(learner, {}, None)["l2_init"].backward()  # type: ignore[arg-type]
        optimizer.step()
    torch.testing.assert_close(weight.detach() - start, gap * (1 - 2 * STRENGTH * 0.1) ** 5, rtol=1e-4, atol=1e-6)
