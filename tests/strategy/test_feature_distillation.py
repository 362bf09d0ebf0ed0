"""Feature distillation against a hand-written loop, for both distances and both weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run, train
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.strategy.feature_distillation import FeatureDistillation
from clplatform.types import Batch


def make(**changes: Any) -> FeatureDistillation:
    strategy = from_page("feature_distillation", **changes)
    assert isinstance(strategy, FeatureDistillation)
    return strategy


def written_out(now: Tensor, then: Tensor, distance: str) -> Tensor:
    """Mean over the batch, sample by sample."""
    total = now.new_zeros(())
    for f, g in zip(now, then, strict=True):
        if distance == "cosine":
            total = total + 1 - (f * g).sum() / ((f * f).sum().sqrt() * (g * g).sum().sqrt())
        else:
            total = total + sum((a - b) ** 2 for a, b in zip(f, g, strict=True)) / 2
    return total / len(now)


def learn(recorder: Recorder, distance: str, weights: list[float], *, first: int = 0) -> Model:
    model = Model(recorder.before[0])
    for i, (start, batches) in enumerate(zip(recorder.before, recorder.batches, strict=True)):
        teacher = copy.deepcopy(model) if i else None  # before it grows
        model.grow(start)

        def loss(model: Model, batch: Batch, logits: Tensor, i: int = i, teacher: Model | None = teacher) -> Tensor:
            task = F.cross_entropy(logits[:, first * i :], batch["labels"] - first * i)
            if teacher is None:
                return task
            with torch.no_grad():
                then = teacher.features(batch["pixel_values"])
            return task + weights[i] * written_out(model.features(batch["pixel_values"]), then, distance)

        train(model, batches, loss)
    return model


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, distance: str, tmp_path: Path) -> None:
    strategy = make(distance=distance, strength=0.8, adaptive=False)
    experiment, recorder = run(tmp_path, "feature_distillation", strategy, stream=TinyStream(scenario=scenario))
    first = 2 if scenario == "task_incremental" else 0
    close(learn(recorder, distance, [0.8] * 3, first=first), experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scenario", "weights"),
    [("class_incremental", [0, 0.8, 0.8 * math.sqrt(2)]), ("domain_incremental", [0, 0.8, 0.8])],
)
def test_the_weight_grows_with_the_share_of_old_classes(scenario: str, weights: list[float], tmp_path: Path) -> None:
    strategy, stream = make(strength=0.8), TinyStream(scenario=scenario)
    experiment, recorder = run(tmp_path, "feature_distillation", strategy, stream=stream)
    close(learn(recorder, "cosine", weights), experiment.learner, rtol=1e-4, atol=1e-5)
    wrong = learn(recorder, "cosine", [0, 0.8, 0.8 / math.sqrt(2)])
    with pytest.raises(AssertionError):
        close(wrong, experiment.learner, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_the_model_of_before_in_eval_mode(tmp_path: Path) -> None:
    strategy, stream = make(distance="l2", adaptive=False), TinyStream()
    experiment, recorder = run(tmp_path, "feature_distillation", strategy, stream=stream, dropout=0.5)
    learner = experiment.learner.train()
    batch = stream[2].train.fetch(torch.arange(32))
    output, then = learner(batch), Model(recorder.after[1]).features(batch["pixel_values"])
    found = strategy.loss(learner, batch, output)["feature_distillation"]
    torch.testing.assert_close(found, 5 * written_out(output.features, then, "l2"))


def test_the_cosine_ignores_the_length_of_features(tmp_path: Path) -> None:
    strategy, stream = make(), TinyStream()
    experiment, _ = run(tmp_path, "feature_distillation", strategy, stream=stream)
    learner = experiment.learner.eval()
    batch = stream[2].train.fetch(torch.arange(32))
    output = learner(batch)
    once = strategy.loss(learner, batch, output)["feature_distillation"]
    output.features = 3 * output.features
    torch.testing.assert_close(strategy.loss(learner, batch, output)["feature_distillation"], once)


def test_replayed_rows_count_too(tmp_path: Path) -> None:
    strategy, recorder, rows = make(), Recorder(), []
    loss = strategy.loss

    def spy(learner: Any, batch: Batch, output: Any) -> dict[str, Tensor]:
        found = loss(learner, batch, output)
        if found:
            then = Model(recorder.after[0]).features(batch["pixel_values"])
            expected = 5 * written_out(output.features, then, "cosine")
            torch.testing.assert_close(found["feature_distillation"], expected, rtol=1e-4, atol=1e-6)
            rows.append(len(then))
        return found

    strategy.loss = spy  # type: ignore[method-assign]
    chain = {"replay": from_page("replay", batch_size=5), "feature_distillation": strategy, "recorder": recorder}
    make_experiment(tmp_path, chain, stream=TinyStream(2)).run()
    assert rows == [13] * 8


def test_nothing_to_keep_in_the_first_experience(tmp_path: Path) -> None:
    strategy = make()
    make_experiment(tmp_path, {"feature_distillation": strategy}, stream=TinyStream(1)).run()
    assert strategy.teacher is None
    assert strategy.cost() == {"extra_parameters": 0}
