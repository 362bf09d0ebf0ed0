"""SI against a loop written out step by step, the loss that the path explains, and Avalanche's plugin."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run
from pytorch_lightning.plugins.precision import MixedPrecision
from stepwise import Named, anchor_of, distance, learner_name, walk
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.fitting import Fitter
from clplatform.strategy.base import Strategy
from clplatform.strategy.si import SI
from clplatform.types import Batch, Experience

STRENGTH, DAMPING, NOISE = 0.5, 0.01, 1.5


def make() -> SI:
    strategy = from_page("si", strength=STRENGTH, damping=DAMPING)
    assert isinstance(strategy, SI)
    return strategy


class ByHand:
    """c Σ Ω (θ − θ*)²,  Ω = max(0, Ω + ω / (Δ² + ξ)),  ω = −Σ g · step, and the usual mistakes."""

    def __init__(self, mistake: str = "") -> None:
        self.mistake = mistake
        self.omega: Named = {}
        self.anchor: Named = {}

    def penalty(self, model: Model) -> Tensor:
        return (STRENGTH / 2 if self.mistake == "half" else STRENGTH) * distance(model, self.omega, self.anchor)

    def learn(self, model: Model, batches: list[Batch], **options: Any) -> None:
        start = anchor_of(model)
        path = {name: torch.zeros_like(p) for name, p in start.items()}

        def after(gradient: Named, step: Named) -> None:
            for name in path:
                path[name] -= gradient[name] * step[name]

        walk(model, batches, self.penalty, after=after, penalised=self.mistake == "penalty in the path", **options)
        self.anchor, earlier = anchor_of(model), self.omega
        self.omega = {}
        for name, p in self.anchor.items():
            self.omega[name] = path[name] / ((p - start[name]) ** 2 + DAMPING)
            if name in earlier:
                self.omega[name][: len(earlier[name])] += earlier[name]
            if self.mistake != "negative importance":
                self.omega[name] = self.omega[name].clamp_min(0)


def learn(by_hand: ByHand, recorder: Recorder, **options: Any) -> Model:
    model = Model(recorder.before[0])
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        by_hand.learn(model, batches, **options)
    return model


# What the run is given, what the loop is given.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": ({}, {}),
    # so much decay that many weights go against their gradient: ω < 0
    "adam, weight decay": (
        {"optimizer": (adam := partial(torch.optim.AdamW, lr=0.02, weight_decay=5.0, eps=1e-3))},
        {"optimizer": adam},
    ),
    "clipping": ({"trainer": {"gradient_clip_val": 0.2}}, {"clip": 0.2}),
    "accumulation": ({"trainer": {"accumulate_grad_batches": 3}}, {"accumulate": 3}),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(kind: str, scenario: str, tmp_path: Path) -> None:
    ours, theirs = OPTIONS[kind]
    si, by_hand = make(), ByHand()
    experiment, recorder = run(tmp_path, "si", si, stream=TinyStream(noise=NOISE, scenario=scenario), **ours)
    close(learn(by_hand, recorder, **theirs), experiment.learner, rtol=1e-4, atol=1e-5)
    for name, omega in by_hand.omega.items():
        torch.testing.assert_close(si.quadratic.weight[learner_name(name)], omega, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mistake", ["half", "penalty in the path", "negative importance"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    ours, theirs = OPTIONS["adam, weight decay"]
    experiment, recorder = run(tmp_path, "si", make(), stream=TinyStream(noise=NOISE), **ours)
    with pytest.raises(AssertionError, match="not close"):
        close(learn(ByHand(mistake), recorder, **theirs), experiment.learner, rtol=1e-4, atol=1e-5)


class Scaled(MixedPrecision):
    """The loss scaling of float16 in float32: nothing is rounded, so results must be those of no scaling."""

    def forward_context(self) -> Any:
        return contextlib.nullcontext()


def test_the_loss_scale_is_no_part_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the gradient is remembered nor where the penalty's is added."""
    options: dict[str, Any] = {"trainer": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.2}}
    plain, scaled = make(), make()
    expected, _ = run(tmp_path / "a", "si", plain, stream=TinyStream(noise=NOISE), **options)
    trainer_of = Fitter.make_trainer
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def make_trainer(self: Fitter, *args: Any) -> Any:
        trainer = trainer_of(self, *args)
        trainer.strategy.precision_plugin = Scaled("16-mixed", "cpu", scaler)
        return trainer

    monkeypatch.setattr(Fitter, "make_trainer", make_trainer)
    found, _ = run(tmp_path / "b", "si", scaled, stream=TinyStream(noise=NOISE), **options)
    assert found.learner.steps == expected.learner.steps
    assert scaler.get_scale() == 1024
    for name, weight in expected.learner.state_dict().items():
        torch.testing.assert_close(found.learner.state_dict()[name], weight)
    for name, weight in plain.quadratic.weight.items():
        torch.testing.assert_close(scaled.quadratic.weight[name], weight)


class Spy(Strategy):
    """Before SI in the chain: the path as an experience leaves it."""

    def __init__(self, si: SI) -> None:
        self.si = si
        self.change: list[Named] = []

    def after_experience(self, learner: Any, experience: Experience) -> None:
        self.change.append(dict(self.si.path.change))


def test_the_path_explains_by_how_much_the_loss_fell(tmp_path: Path) -> None:
    """Whole batches and small steps: Σ_i ω_i = L(start) − L(end), the line integral of the gradient."""
    si, recorder, stream = make(), Recorder(), TinyStream(1, per_class=4)
    spy = Spy(si)
    options: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=0.005), "trainer": {"max_epochs": 200}}
    make_experiment(tmp_path, {"recorder": recorder, "spy": spy, "si": si}, stream=stream, **options).run()
    batch = stream[0].train.fetch(torch.arange(8))
    before, after = (
        F.cross_entropy(Model(weights)(batch["pixel_values"]), batch["labels"]).item()
        for weights in (recorder.before[0], recorder.after[0])
    )
    assert before - after > 0.1
    assert sum(c.sum().item() for c in spy.change[0].values()) == pytest.approx(before - after, rel=0.02)


def test_new_rows_of_the_head_are_free_and_what_moved_them_counts(tmp_path: Path) -> None:
    si, stream = make(), TinyStream(2, noise=NOISE)
    experiment, _ = run(tmp_path, "si", si, stream=stream)
    learner: Any = experiment.learner
    learner.build(TinyStream(3)[2].info)
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.3
            p.grad = None
    si.quadratic.add_gradient(learner, 2 * STRENGTH)
    assert (learner.head.linear.weight.grad[4:] == 0).all()
    assert (si.quadratic.weight["head.linear.weight"][:2] > 0).any()
    assert (si.quadratic.weight["head.linear.weight"][2:] > 0).any()
    expected = 2 * STRENGTH * 0.3 * si.quadratic.weight["backbone.layer.weight"]
    torch.testing.assert_close(learner.backbone.layer.weight.grad, expected)


def test_the_penalty_is_logged_and_is_the_written_out_sum(tmp_path: Path) -> None:
    si = make()
    experiment, _ = run(tmp_path, "si", si, stream=TinyStream(2, noise=NOISE))
    learner: Any = experiment.learner
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.3
    (value,) = si.loss(learner, {}, None).values()  # type: ignore[arg-type]
    expected = STRENGTH * sum(0.3**2 * w.sum() for w in si.quadratic.weight.values())
    torch.testing.assert_close(value, expected)
    assert not value.requires_grad


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_the_first_importance_is_that_of_avalanche_s_plugin(tmp_path: Path) -> None:
    """Its own calls in a loop over the same batches, before it cuts the result off at 0.001. From the second experience
    on the two differ: its path includes its penalty's gradient."""
    from avalanche.training.plugins import SynapticIntelligencePlugin

    si = make()
    _, recorder = run(tmp_path, "si", si, stream=TinyStream(1, noise=NOISE))
    model, plugin = Model(recorder.before[0]), SynapticIntelligencePlugin(si_lambda=0.0, eps=DAMPING)
    host: Any = SimpleNamespace(model=model, device=torch.device("cpu"), clock=SimpleNamespace(train_exp_counter=0))
    plugin.before_training_exp(host)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in recorder.batches[0]:
        plugin.before_training_iteration(host)
        for p in model.parameters():  # on a CPU the plugin holds the weights themselves, and sees no step
            p.data = p.data.clone()
        optimizer.zero_grad()
        F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()
        plugin.after_training_iteration(host)
    plugin.after_training_exp(host)
    for name, trajectory in plugin.syn_data["cum_trajectory"].items():
        ours = si.quadratic.weight[learner_name(name)].flatten()
        torch.testing.assert_close(ours, (-trajectory.data).clamp_min(0), rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
