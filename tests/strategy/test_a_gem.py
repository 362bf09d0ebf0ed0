"""A-GEM against a hand-written loop: what is projected, on what, and when."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Memory, Model, Recorder, close, run, samples
from projected import learn, loss_gradient
from pytorch_lightning.plugins import MixedPrecision
from strategies import from_page
from torch import Tensor
from world import TinyStream, make_experiment

from clplatform.fitting import Fitter
from clplatform.strategy.a_gem import AGEM
from clplatform.types import Batch


def make(**changes: Any) -> AGEM:
    strategy = from_page("a_gem", **{"policy": "reservoir", "batch_size": 6, **changes})
    assert isinstance(strategy, AGEM)
    return strategy


NOISE = 1.0  # so that some steps conflict with the memory and some do not


class ByHand:
    """g̃ = g − (g·r / r·r) r where g·r < 0, with r on the samples that were drawn; and the usual mistakes."""

    def __init__(self, memory: Memory, stream: Any, *, steps_without: int, mistake: str = "") -> None:
        self.memory, self.draws, self.known = memory, iter(memory.draws), samples(stream)
        self.left, self.mistake = steps_without, mistake
        self.conflicts: list[bool] = []

    def __call__(self, model: Model, g: Tensor) -> Tensor:
        self.left -= 1
        if self.left >= 0:
            return g
        r = loss_gradient(model, [self.known[self.memory.index[visit]] for visit in next(self.draws)])
        self.conflicts.append(bool(g @ r < 0))
        if self.mistake == "always":
            return g - (g @ r) / (r @ r) * r
        if self.mistake == "not squared":
            return g - (g @ r) / r.norm() * r if g @ r < 0 else g
        if self.mistake == "never":
            return g
        return g - (g @ r) / (r @ r) * r if g @ r < 0 else g


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": ({}, {}, 8),
    "accumulated and clipped": (
        {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}}, {"accumulate": 2, "clip": 0.2}, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, options: str, tmp_path: Path) -> None:
    ours, theirs, steps = OPTIONS[options]
    stream, a_gem = TinyStream(scenario=scenario, noise=NOISE), make()
    memory = Memory(a_gem.buffer)
    experiment, recorder = run(tmp_path, "a_gem", a_gem, stream=stream, **ours)
    memory.check(6)
    by_hand = ByHand(memory, stream, steps_without=steps)
    model = learn(recorder, by_hand, **theirs)
    assert len(by_hand.conflicts) == 2 * steps  # a draw for each step, not for each batch
    assert True in by_hand.conflicts
    assert False in by_hand.conflicts or scenario != "domain_incremental"
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mistake", ["always", "never", "not squared"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    stream, a_gem = TinyStream(scenario="domain_incremental", noise=NOISE), make()
    memory = Memory(a_gem.buffer)
    experiment, recorder = run(tmp_path, "a_gem", a_gem, stream=stream)
    model = learn(recorder, ByHand(memory, stream, steps_without=8, mistake=mistake))
    with pytest.raises(AssertionError, match="not close"):
        close(model, experiment.learner, rtol=1e-4, atol=1e-5)


def test_projecting_each_batch_of_a_step_would_be_seen(tmp_path: Path) -> None:
    stream, a_gem = TinyStream(scenario="domain_incremental", noise=NOISE), make()
    memory = Memory(a_gem.buffer)
    options: dict[str, Any] = {"trainer": {"accumulate_grad_batches": 2}}
    experiment, recorder = run(tmp_path, "a_gem", a_gem, stream=stream, **options)
    by_hand = ByHand(memory, stream, steps_without=4)
    by_hand.left, by_hand.draws = 8, iter([d for draw in memory.draws for d in (draw, draw)])
    model = learn(recorder, by_hand, accumulate=1)
    with pytest.raises(AssertionError, match="not close"):
        close(model, experiment.learner, rtol=1e-4, atol=1e-5)


class Scaled(MixedPrecision):
    """The loss scaling of float16 in float32: nothing is rounded, so results must be those of no scaling."""

    def forward_context(self) -> Any:
        return contextlib.nullcontext()


@pytest.mark.parametrize("name", ["a_gem", "gem"])
def test_gradients_are_projected_unscaled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaled gradient would be projected alike by A-GEM, but clipping and GEM's margin would see another."""
    options: dict[str, Any] = {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}}
    expected, _ = run(tmp_path / "a", name, from_page(name), **options)
    trainer_of, scaler = Fitter.make_trainer, torch.amp.GradScaler("cpu", init_scale=1024.0)

    def make_trainer(self: Fitter, *args: Any) -> Any:
        trainer = trainer_of(self, *args)
        trainer.strategy.precision_plugin = Scaled("16-mixed", "cpu", scaler)
        return trainer

    monkeypatch.setattr(Fitter, "make_trainer", make_trainer)
    found, _ = run(tmp_path / "b", name, from_page(name), **options)
    assert found.learner.steps == expected.learner.steps
    assert scaler.get_scale() == 1024
    for key, weight in expected.learner.state_dict().items():
        torch.testing.assert_close(found.learner.state_dict()[key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["a_gem", "gem"])
def test_learns_in_mixed_precision(name: str, tmp_path: Path) -> None:
    results = make_experiment(tmp_path, {name: from_page(name)}, trainer={"precision": "bf16-mixed"}).run()
    assert all(results.matrix[i + 1][i] > 0.7 for i in range(3))  # type: ignore[operator]


def test_no_step_raises_the_loss_on_the_memory_to_first_order(tmp_path: Path) -> None:
    """Along what is left of the gradient, whatever other strategies add to the loss."""
    a_gem, recorder, inner = make(capacity=96, batch_size=96), Recorder(), []
    edit = a_gem.edit_gradients

    def spy(learner: Any) -> None:
        edit(learner)
        if len(a_gem.buffer):
            rows = a_gem.buffer.take(torch.arange(len(a_gem.buffer)))
            loss = learner.task_loss(rows, learner(rows))
            named = dict(learner.named_parameters())
            gradient = torch.autograd.grad(loss, list(named.values()))
            inner.append(float(sum((g * p.grad).sum() for g, p in zip(gradient, named.values(), strict=True))))

    a_gem.edit_gradients = spy  # type: ignore[method-assign]
    strategies = {"recorder": recorder, "lwf": from_page("lwf"), "a_gem": a_gem}
    make_experiment(tmp_path, strategies).run()
    assert len(inner) == 16
    assert min(inner) > -1e-6
    assert sum(abs(x) < 1e-6 for x in inner) > 2  # where there was a conflict


def test_the_memory_holds_what_came_before_augmentation_once(tmp_path: Path) -> None:
    def flip(batch: Batch, generator: torch.Generator) -> Batch:
        return {**batch, "pixel_values": -batch["pixel_values"] - 100}

    a_gem, stream = make(policy="class_balanced"), TinyStream()
    make_experiment(tmp_path, {"a_gem": a_gem}, stream=stream, augment=flip).run()
    stored, known = a_gem.buffer.take(torch.arange(20)), samples(stream)
    assert sorted(torch.bincount(stored["labels"]).tolist()) == [3, 3, 3, 3, 4, 4]
    assert a_gem.buffer.n_seen == 3 * 32
    for i, x in zip(stored["index"], stored["pixel_values"], strict=True):
        assert torch.equal(x, known[int(i)][0])


def test_it_forgets_less_than_fine_tuning(tmp_path: Path) -> None:
    a_gem = make_experiment(tmp_path / "a", {"a_gem": make(capacity=96, batch_size=96)}).run()
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}).run()
    assert a_gem.metrics["average_forgetting"] < plain.metrics["average_forgetting"]  # type: ignore[operator]
