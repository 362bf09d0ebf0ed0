"""EWC against the written-out sum over tasks, a closed form, and Avalanche's plugin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run, train
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.strategy.ewc import EWC
from clplatform.types import Batch, Data

Named = dict[str, Tensor]

NOISE = 1.5  # classes that overlap: with certain predictions there is next to no Fisher information


def make(**changes: Any) -> EWC:
    strategy = from_page("ewc", **{"samples": None, "fisher": "empirical", "strength": 30.0, **changes})
    assert isinstance(strategy, EWC)
    return strategy


def fisher(model: Model, data: Data) -> Named:
    """1/N Σ_n (∂ log p(y_n|x_n))², sample by sample."""
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    batch = data.fetch(torch.arange(len(data)))
    for x, y in zip(batch["pixel_values"], batch["labels"], strict=True):
        log_p = F.log_softmax(model(x[None]), 1)[0, y]
        for name, g in zip(named, torch.autograd.grad(log_p, list(named.values())), strict=True):
            total[name] += g**2 / len(data)
    return total


class ByHand:
    """λ/2 Σ_k Σ_i F_ki (θ_i − θ*_ki)², or with F̃ = γ F̃ + F around the latest θ*; old rows of a head only."""

    def __init__(self, strength: float, gamma: float | None = None) -> None:
        self.strength, self.gamma = strength, gamma
        self.tasks: list[tuple[Named, Named]] = []

    def penalty(self, model: Model) -> Tensor:
        total = torch.zeros(())
        for weight, anchor in self.tasks:
            for name, p in model.named_parameters():
                total = total + (weight[name] * (p[: len(anchor[name])] - anchor[name]) ** 2).sum()
        return self.strength / 2 * total

    def __call__(self, model: Model, batch: Batch, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, batch["labels"]) + self.penalty(model)

    def consolidate(self, model: Model, data: Data) -> None:
        weight = fisher(model, data)
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        if self.gamma is not None and self.tasks:
            for name, old in self.tasks.pop()[0].items():
                weight[name][: len(old)] += self.gamma * old
        self.tasks.append((weight, anchor))


def learn(by_hand: ByHand, stream: TinyStream, recorder: Recorder) -> Model:
    model = Model(recorder.before[0])
    for experience, start, batches in zip(stream, recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches, by_hand)
        by_hand.consolidate(model, experience.train)
    return model


KINDS: dict[str, tuple[dict[str, Any], float | None]] = {
    "separate": ({}, None),
    "online": ({"online": True, "gamma": 0.6}, 0.6),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(kind: str, scenario: str, tmp_path: Path) -> None:
    changes, gamma = KINDS[kind]
    stream = TinyStream(noise=NOISE, scenario=scenario)
    experiment, recorder = run(tmp_path, "ewc", make(**changes), stream=stream)
    close(learn(ByHand(30.0, gamma), stream, recorder), experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_and_gradient_are_the_written_out_sum(kind: str, tmp_path: Path) -> None:
    """Away from the trained weights; the head's newest rows are free."""
    changes, gamma = KINDS[kind]
    stream, ewc, by_hand = TinyStream(noise=NOISE), make(**changes), ByHand(30.0, gamma)
    experiment, recorder = run(tmp_path, "ewc", ewc, stream=stream)
    learner: Any = experiment.learner
    for i in range(3):
        by_hand.consolidate(Model(recorder.after[i]), stream[i].train)
    learner.build(TinyStream(4)[3].info)  # two more classes
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.3 * torch.randn_like(p)
    model = Model(learner.state_dict())
    ours = ewc.loss(learner, {}, None)["ewc"]  # type: ignore[arg-type]
    theirs = by_hand.penalty(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    found = dict(zip(model.named(), torch.autograd.grad(ours, list(learner.parameters())), strict=True))
    expected = dict(zip(model.named(), torch.autograd.grad(theirs, list(model.parameters())), strict=True))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert (found["head.linear.weight"][6:] == 0).all()
    assert (found["head.linear.weight"][:6] != 0).all()


def test_fisher_of_logistic_regression_in_closed_form(tmp_path: Path) -> None:
    """For logits Vh + c: E_y[(∂/∂V_kd)²] = E[p_k (1 − p_k) h_d²], a quarter of it or less each."""
    ewc, stream = make(fisher="exact"), TinyStream(1)
    experiment, _ = run(tmp_path, "ewc", ewc, stream=stream)
    batch = stream[0].train.fetch(torch.arange(32))
    with torch.no_grad():
        output = experiment.learner.eval()(batch)
    p, h = output.logits.softmax(1), output.features
    expected = torch.einsum("nk,nd->kd", p * (1 - p), h**2) / len(h)
    torch.testing.assert_close(ewc.quadratic.weight["head.linear.weight"], expected)
    torch.testing.assert_close(ewc.quadratic.weight["head.linear.bias"], (p * (1 - p)).mean(0))


def test_anchors_are_the_weights_at_the_end_of_the_experience(tmp_path: Path) -> None:
    ewc = make(online=True)
    _, recorder = run(tmp_path, "ewc", ewc)
    for name, anchor in ewc.quadratic.anchor.items():
        assert torch.equal(anchor, recorder.after[-1][name])


def test_what_is_frozen_later_keeps_its_earlier_importance(tmp_path: Path) -> None:
    """As a share γ of it, around the latest weights: the second experience measures nothing of it."""
    ewc = make(online=True, gamma=0.6)
    experiment = make_experiment(tmp_path, {"ewc": ewc}, stream=TinyStream(1, noise=NOISE))
    experiment.run()
    learner, before = experiment.learner, dict(ewc.quadratic.weight)
    frozen = learner.backbone.layer.weight
    frozen.requires_grad_(False)
    ewc.after_experience(learner, TinyStream(1, noise=NOISE)[0])
    name = "backbone.layer.weight"
    assert (before[name] > 0).any()
    assert torch.equal(ewc.quadratic.weight[name], 0.6 * before[name])
    assert torch.equal(ewc.quadratic.anchor[name], frozen)
    frozen.requires_grad_(True)
    with torch.no_grad():
        frozen += 1.0
    assert ewc.loss(learner, {}, None)["ewc"] >= 30.0 / 2 * 0.6 * before[name].sum()  # type: ignore[arg-type]


def test_the_first_experience_s_fisher_uses_its_own_data_only(tmp_path: Path) -> None:
    """Rows that replay adds belong to another experience's Fisher information."""
    alone, beside = make(), make()
    make_experiment(tmp_path / "a", {"ewc": alone}, stream=TinyStream(1)).run()
    make_experiment(tmp_path / "b", {"replay": from_page("replay"), "ewc": beside}, stream=TinyStream(1)).run()
    for name, weight in alone.quadratic.weight.items():
        assert torch.equal(weight, beside.quadratic.weight[name])


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_avalanche_s_plugin(kind: str, tmp_path: Path) -> None:
    """The real plugin, in a loop over the same batches, with a Fisher information from batches of one and
    λ_avalanche = λ/2: its penalty has no ½, and it squares the gradient of a batch's mean loss."""
    from avalanche.training.plugins import EWCPlugin

    changes, gamma = KINDS[kind]
    stream = TinyStream(noise=NOISE)
    experiment, recorder = run(tmp_path, "ewc", make(**changes), stream=stream)
    plugin = EWCPlugin(30.0 / 2, mode=kind, decay_factor=gamma)
    model = Model(recorder.before[0])
    host: Any = SimpleNamespace(
        clock=SimpleNamespace(train_exp_counter=0),
        model=model,
        _criterion=F.cross_entropy,
        device=torch.device("cpu"),
        train_mb_size=1,
    )

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        host.loss = F.cross_entropy(logits, batch["labels"])
        plugin.before_backward(host)
        return host.loss

    for i, (experience, start, batches) in enumerate(zip(stream, recorder.before, recorder.batches, strict=True)):
        model.grow(start)
        host.clock.train_exp_counter, host.optimizer = i, torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, batches, loss)
        batch = experience.train.fetch(torch.arange(len(experience.train)))
        samples = list(zip(batch["pixel_values"], batch["labels"], batch["task_labels"], strict=True))
        host.experience = SimpleNamespace(dataset=samples)
        plugin.after_training_exp(host)
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)
