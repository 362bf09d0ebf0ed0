"""LFL against a hand-written loop, and Avalanche's plugin."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run, train
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, weights

from clplatform.strategy.lfl import LFL
from clplatform.types import Batch

STRENGTH = 0.4


def make() -> LFL:
    strategy = from_page("lfl", strength=STRENGTH)
    assert isinstance(strategy, LFL)
    return strategy


def distance(now: Tensor, then: Tensor) -> Tensor:
    """½ ‖now − then‖² of features [B, D], mean over the batch, written out."""
    return sum(0.5 * ((a - b) ** 2).sum() for a, b in zip(now, then, strict=True)) / len(now)  # type: ignore[return-value]


def learn(recorder: Recorder, mistake: str = "") -> Model:
    """Features held, the classifier's old rows without a gradient; and the usual mistakes."""
    model = Model(recorder.before[0])
    for i, (start, batches) in enumerate(zip(recorder.before, recorder.batches, strict=True)):
        teacher, n_old = copy.deepcopy(model), len(model.head.bias)
        model.grow(start)
        n_frozen = {"nothing is frozen": 0, "all is frozen": len(model.head.bias)}.get(mistake, n_old)
        if i > 0:
            for p in model.head.parameters():
                p.register_hook(lambda g, n=n_frozen: torch.cat([torch.zeros_like(g[:n]), g[n:]]))

        def loss(model: Model, batch: Batch, logits: Tensor, i: int = i, teacher: Model = teacher) -> Tensor:
            total = F.cross_entropy(logits, batch["labels"])
            if i == 0:
                return total
            with torch.no_grad():
                then = teacher.features(batch["pixel_values"])
            scale = {"no half": 2.0, "mean over dimensions": 1 / 16}.get(mistake, 1.0)
            return total + scale * STRENGTH * distance(model.features(batch["pixel_values"]), then)

        train(model, batches, loss)
    return model


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, "lfl", make(), stream=TinyStream(scenario=scenario))
    close(learn(recorder), experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mistake", ["no half", "mean over dimensions", "nothing is frozen", "all is frozen"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, "lfl", make())
    with pytest.raises(AssertionError, match="not close"):
        close(learn(recorder, mistake), experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_old_rows_stay_to_the_bit_against_momentum_and_weight_decay(scenario: str, tmp_path: Path) -> None:
    adam = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.5)
    stream = TinyStream(scenario=scenario)
    _, recorder = run(tmp_path, "lfl", make(), stream=stream, optimizer=adam)
    for before, after in zip(recorder.after, recorder.after[1:], strict=False):
        for name in ("head.linear.weight", "head.linear.bias"):
            n = len(before[name])
            assert torch.equal(after[name][:n], before[name])
        assert not torch.equal(after["backbone.layer.weight"], before["backbone.layer.weight"])
    if scenario != "domain_incremental":  # the newest rows have been trained
        assert not torch.equal(
            recorder.after[-1]["head.linear.weight"][4:], recorder.before[-1]["head.linear.weight"][4:]
        )


def test_clipping_does_not_count_the_frozen_rows(tmp_path: Path) -> None:
    """Their gradient is taken away before the norm is taken."""
    lfl, stream = make(), TinyStream(2, scenario="domain_incremental")
    experiment, _ = run(tmp_path, "lfl", lfl, stream=stream)
    learner: Any = experiment.learner
    for p in learner.parameters():
        p.grad = torch.ones_like(p)
    lfl.edit_gradients(learner)
    assert (learner.head.linear.weight.grad == 0).all()
    assert (learner.backbone.layer.weight.grad == 1).all()


def test_all_of_a_head_with_a_scale_is_kept_in_a_domain(tmp_path: Path) -> None:
    """A parameter without dimensions (the cosine head's scale) too."""
    from clplatform.head.cosine import CosineHead

    stream = TinyStream(2, scenario="domain_incremental")
    experiment = make_experiment(tmp_path, {"lfl": make()}, stream=stream)
    learner: Any = experiment.learner
    learner.make_head = partial(CosineHead, feature_size=16, scale=5.0)
    learner.head = learner.make_head()
    after: list[dict[str, Tensor]] = []
    experiment.observers = [
        SimpleNamespace(start_experience=lambda *_: None, finish_experience=lambda *_: after.append(weights(learner)))
    ]
    experiment.run()
    assert not torch.equal(after[0]["head.scale"], after[1]["head.scale"])  # the first experience trains it
    assert torch.equal(after[1]["head.scale"], after[2]["head.scale"])
    assert torch.equal(after[1]["head.weight"], after[2]["head.weight"])


def test_the_teacher_is_the_model_of_before_in_eval_mode(tmp_path: Path) -> None:
    lfl, stream = make(), TinyStream()
    experiment, recorder = run(tmp_path, "lfl", lfl, stream=stream, dropout=0.5)
    experiment.learner.train()
    batch = stream[2].train.fetch(torch.arange(32))
    model = Model(recorder.after[1])  # which has no dropout at all
    then = model.features(batch["pixel_values"])
    assert lfl.teacher is not None
    torch.testing.assert_close(lfl.teacher(batch).features, then)
    output = experiment.learner(batch)  # with dropout
    found = lfl.loss(experiment.learner, batch, output)["lfl"]
    torch.testing.assert_close(found, STRENGTH * distance(output.features, then))


def test_nothing_to_keep_in_the_first_experience(tmp_path: Path) -> None:
    lfl = make()
    make_experiment(tmp_path, {"lfl": lfl}, stream=TinyStream(1)).run()
    assert lfl.teacher is None
    assert lfl.cost() == {"extra_parameters": 0}


class Featured(Model):
    """The name that Avalanche's plugin looks for."""

    def get_features(self, x: Tensor) -> Tensor:
        return self.features(x)


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_agrees_with_avalanche_s_plugin(tmp_path: Path) -> None:
    """The real plugin in a loop over the same batches, where it is at home (domains, the whole classifier frozen): its
    penalty is the mean over 16 dimensions without ½."""
    from avalanche.training.plugins import LFLPlugin

    experiment, recorder = run(tmp_path, "lfl", make(), stream=TinyStream(scenario="domain_incremental"))
    model, plugin = Featured(recorder.before[0]), LFLPlugin(lambda_e=STRENGTH * 16 / 2)
    host: Any = SimpleNamespace(model=model, clock=SimpleNamespace(train_exp_counter=0))

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        host.mb_x, host.loss = batch["pixel_values"], F.cross_entropy(logits, batch["labels"])
        plugin.before_backward(host)
        return host.loss

    for batches in recorder.batches:
        train(model, batches, loss)
        plugin.after_training_exp(host)
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)
