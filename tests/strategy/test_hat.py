"""HAT: its equations written out in a loop, and earlier tasks' outputs that never change."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Recorder
from strategies import from_page
from test_resume import resume, run_until
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from torch.nn import functional as F
from world import DIM, TinyStream, make_experiment, make_learner, same, tiny_vit, weights

from clplatform.backbone.mlp import MLP
from clplatform.strategy.hat import HAT
from clplatform.types import Batch, ClplatformError, InputSpec

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
}
PLAIN = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
S_MAX, C = 400.0, 0.1


def make(**changes: Any) -> HAT:
    strategy = from_page("hat", **{"strength": C, **changes})  # a layer of a few units would be closed by more
    assert isinstance(strategy, HAT)
    return strategy


def perceptron() -> MLP:
    torch.manual_seed(0)
    spec = InputSpec("image", shape=(1, 1, DIM), mean=(0.0,), std=(1.0,))
    return MLP(input=spec, name="mlp", hidden=[24, 16], dropout=0.0, freeze="none")


class Spy(Recorder):
    """After HAT in the chain: the test logits of every task seen after each experience, too."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.tests = [e.test.fetch(torch.arange(len(e.test))) for e in stream]
        self.answers: list[list[Tensor]] = []

    def collect(self, learner: Any) -> None:
        with torch.no_grad():
            self.answers.append([learner.eval()(b).logits for b in self.tests[: len(learner.seen)]])


def learn(folder: Path, optimizer: str = "sgd", *, make_one: Any = make_experiment, **options: Any) -> tuple[Any, Spy]:
    stream = options.pop("stream", None) or TinyStream(scenario="task_incremental")
    spy = Spy(stream)
    chain = {"hat": make(**options.pop("hat", {})), "spy": spy}
    experiment = make_one(folder, chain, stream=stream, optimizer=OPTIMIZERS.get(optimizer, PLAIN), **options)
    record = experiment._record

    def spying(experience: Any, times: Any) -> None:
        spy.collect(experiment.learner)
        record(experience, times)

    experiment._record = spying
    experiment.run()
    return experiment, spy


# -- what is learned never changes --------------------------------------------------------------------------------------


def check_protected(experiment: Any, spy: Spy) -> None:
    """The logits of a task's classes after any later experience, up to the rounding of a wider matrix product."""
    for t in range(3):
        own = slice(2 * t, 2 * t + 2)
        for later in spy.answers[t + 1 :]:
            torch.testing.assert_close(later[t][:, own], spy.answers[t][t][:, own], rtol=1e-6, atol=1e-6)
    matrix = experiment.results.matrix
    for t in range(3):
        assert {row[t] for row in matrix[t + 1 :]} == {matrix[t + 1][t]}
    assert any(not torch.equal(spy.after[0][n], spy.after[2][n]) for n in spy.after[0] if "head" not in n)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backbone", ["tiny", "mlp", "vit"])
def test_an_earlier_task_s_outputs_stay(backbone: str, optimizer: str, tmp_path: Path) -> None:
    chosen = {"tiny": None, "mlp": perceptron(), "vit": tiny_vit()}[backbone]
    hat = {"first": "full"} if backbone == "vit" else {}
    experiment, spy = learn(tmp_path, optimizer, backbone=chosen, hat=hat, trainer={"max_epochs": 4})
    check_protected(experiment, spy)


@pytest.mark.parametrize("first", ["full", "adapter"])
def test_texts_too(first: str, tmp_path: Path) -> None:
    stream = TinyTextStream(scenario="task_incremental")
    make_one = partial(make_text_experiment, trainer={"max_epochs": 4})
    experiment, spy = learn(tmp_path, "adamw", make_one=make_one, stream=stream, hat={"first": first})
    check_protected(experiment, spy)
    moved = [
        n for n in spy.before[0] if n.startswith("backbone") and not torch.equal(spy.before[0][n], spy.after[0][n])
    ]
    assert bool(moved) == (first == "full")
    for name in spy.before[0]:
        if name.startswith("backbone"):
            assert torch.equal(spy.after[0][name], spy.after[2][name]), name


def test_what_used_units_compute_is_held_to_the_bit(tmp_path: Path) -> None:
    _, spy = learn(tmp_path, backbone=perceptron(), trainer={"max_epochs": 4})
    sizes = [24, 16]
    for t in range(2):
        before, after = spy.after[t], spy.after[t + 1]
        used = [torch.ones(DIM, dtype=torch.bool), *before["extras.hat.used"].split(sizes)]
        assert 0 < used[1].sum() < 24
        for layer in range(2):
            weight, bias = (f"backbone.layers.{layer}.0.{part}" for part in ("weight", "bias"))
            both = used[layer + 1][:, None] & used[layer]
            assert torch.equal(before[weight][both], after[weight][both])
            assert not torch.equal(before[weight][~both], after[weight][~both])
            assert torch.equal(before[bias][used[layer + 1]], after[bias][used[layer + 1]])
        assert torch.equal(before[f"extras.hat.embeddings.{t}"], after[f"extras.hat.embeddings.{t}"])
        assert set(before[f"extras.hat.embeddings.{t}"].tolist()) <= {-6.0, 6.0}
        rows = 2 * t + 2
        assert torch.equal(before["head.linear.weight"], after["head.linear.weight"][:rows])
        assert torch.equal(before["head.linear.bias"], after["head.linear.bias"][:rows])


@torch.no_grad()
def test_a_mixed_batch_equals_one_task_at_a_time(tmp_path: Path) -> None:
    with torch.enable_grad():
        experiment, spy = learn(tmp_path, backbone=perceptron())
    mixed = {name: torch.cat([b[name] for b in spy.tests]) for name in spy.tests[0]}
    order = torch.randperm(len(mixed["labels"]), generator=torch.Generator().manual_seed(0))
    found = experiment.learner.eval()({n: v[order] for n, v in mixed.items()}).logits[order.argsort()]
    torch.testing.assert_close(found, torch.cat(spy.answers[-1]), rtol=1e-5, atol=1e-5)
    x = mixed["pixel_values"].flatten(1)
    end = spy.after[-1]
    for i, task in enumerate(mixed["task_labels"].tolist()):  # gates of 0 and 1, one sample at a time
        h, a = x[i], (end[f"extras.hat.embeddings.{task}"] > 0).float()
        for layer, gate in enumerate(a.split([24, 16])):
            h = gate * (end[f"backbone.layers.{layer}.0.weight"] @ h + end[f"backbone.layers.{layer}.0.bias"]).relu()
        logits = end["head.linear.weight"] @ h + end["head.linear.bias"]
        own = slice(2 * task, 2 * task + 2)
        torch.testing.assert_close(found[i, own], logits[own], rtol=1e-4, atol=1e-5)


# -- the equations ------------------------------------------------------------------------------------------------------


def slope_of(e: Tensor, s: float) -> Tensor:
    """σ'(s e), without loss of precision."""
    x = (s * e.double()).clamp(-50, 50).abs()
    return (-x).exp() / (1 + (-x).exp()) ** 2


def step(w: dict[str, Tensor], batch: Batch, t: int, s: float, used: Tensor, mistake: str) -> dict[str, Tensor]:
    """The gradients of one step, conditioned and compensated, weight by weight."""
    w = {name: value.clone().requires_grad_() for name, value in w.items()}
    a = (s * w["e"]).sigmoid()
    features = ((batch["pixel_values"].flatten(1) @ w["W"].T + w["b"]) * a).tanh()
    logits = (features @ w["V"].T + w["c"])[:, 2 * t :]
    free = [i for i in range(16) if not used[i] or mistake == "no free units"]
    penalty = sum(a[i] for i in free) / len(free)
    strength = 0.0 if mistake == "no penalty" else C
    loss = F.cross_entropy(logits, batch["labels"] - 2 * t) + strength * penalty
    gradient = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    for i in range(16):
        for j in range(DIM):
            gradient["W"][i, j] *= 1 - min(float(used[i]), 1.0) if mistake != "no conditioning" else 1
        gradient["b"][i] *= 1 - float(used[i])
    gradient["V"][: 2 * t], gradient["c"][: 2 * t] = 0, 0
    if mistake != "no compensation":
        factor = S_MAX * slope_of(w["e"].detach(), 1.0) / (s * slope_of(w["e"].detach(), s))
        gradient["e"] = (factor * gradient["e"].double()).float()
    return gradient


def train(spy: Spy, mistake: str = "") -> tuple[dict[str, Tensor], list[Tensor]]:
    """SGD with momentum, written out; four batches an epoch."""
    keys = {
        "W": "backbone.layer.weight",
        "b": "backbone.layer.bias",
        "V": "head.linear.weight",
        "c": "head.linear.bias",
    }
    start = spy.before[0]
    w, used, embeddings = {k: start[name] for k, name in keys.items()}, torch.zeros(16, dtype=torch.bool), []
    for t, (start, batches) in enumerate(zip(spy.before, spy.batches, strict=True)):
        w["V"] = torch.cat([w["V"], start["head.linear.weight"][len(w["V"]) :]])
        w["c"] = torch.cat([w["c"], start["head.linear.bias"][len(w["c"]) :]])
        w["e"] = start[f"extras.hat.embeddings.{t}"]
        momentum = {name: torch.zeros_like(value) for name, value in w.items()}
        for b, batch in enumerate(batches):
            s = 1 / S_MAX + (S_MAX - 1 / S_MAX) * (b % 4) / 3 if mistake != "no annealing" else S_MAX
            gradient = step(w, batch, t, s, used, mistake)
            for name in w:
                momentum[name] = 0.9 * momentum[name] + gradient[name]
                w[name] = w[name] - (0.05 if name == "e" else 0.1) * momentum[name]
            w["e"] = w["e"].clamp(-6, 6)
        embeddings.append(torch.where(w["e"] > 0, 6.0, -6.0))
        used = used | (w["e"] > 0)
    return {keys[k]: value for k, value in w.items() if k in keys}, embeddings


def test_equals_a_hand_written_loop(tmp_path: Path) -> None:
    _, spy = learn(tmp_path, "plain")
    expected, embeddings = train(spy)
    for name, value in expected.items():
        torch.testing.assert_close(spy.after[2][name], value, rtol=1e-3, atol=1e-4)
    for t, value in enumerate(embeddings):
        assert torch.equal(spy.after[2][f"extras.hat.embeddings.{t}"], value)
        assert 0 < (value > 0).sum() < 16


MISTAKES = ["no penalty", "no free units", "no conditioning", "no compensation", "no annealing"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    _, spy = learn(tmp_path, "plain")
    expected, _ = train(spy, mistake)
    name = "backbone.layer.weight"
    assert not torch.allclose(spy.after[2][name], expected[name], rtol=1e-3, atol=1e-3)


def test_the_slope_of_every_batch(tmp_path: Path) -> None:
    stream, hat, seen = TinyStream(1, scenario="task_incremental"), make(s_max=100.0), []
    experiment = make_experiment(tmp_path, {"hat": hat}, stream=stream)
    edit = hat.edit_gradients

    def spy(learner: Any) -> None:
        seen.append(hat.slope(learner))
        edit(learner)

    hat.edit_gradients = spy  # type: ignore[method-assign]
    experiment.run()
    assert seen == pytest.approx([0.01, 33.34, 66.67, 100] * 2)
    assert hat.slope(experiment.learner.eval()) == 100


def test_an_epoch_goes_on_with_its_slope(tmp_path: Path) -> None:
    """Broken off after the second batch of an epoch; a low s_max, with which gates are not yet 0 or 1."""

    def world() -> dict[str, Any]:
        return {"stream": TinyStream(scenario="task_incremental"), "backbone": perceptron()}

    whole = run_until(tmp_path / "whole", {"hat": make(s_max=20.0)}, None, **world())
    run_until(tmp_path / "killed", {"hat": make(s_max=20.0)}, 7, **world())
    resumed = resume(tmp_path / "killed", {"hat": make(s_max=20.0)}, **world())
    assert same(weights(resumed.learner), weights(whole.learner))


def test_embeddings_stay_within_six_and_gradients_of_what_is_held_are_zero(tmp_path: Path) -> None:
    stream, hat, seen = TinyStream(2, scenario="task_incremental"), make(embedding_lr=5.0), []
    experiment = make_experiment(tmp_path, {"hat": hat}, stream=stream)
    edit, step = hat.edit_gradients, hat.after_step

    def edited(learner: Any) -> None:
        edit(learner)
        if learner.experience.index == 1:
            used = learner.extras["hat"].used
            seen.append(used.sum())
            assert not learner.backbone.layer.weight.grad[used].any()
            assert not learner.head.linear.weight.grad[:2].any()
            assert learner.backbone.layer.weight.grad[~used].any()

    def stepped(learner: Any) -> None:
        step(learner)
        seen.append(hat.embedding(learner).abs().max())
        assert seen[-1] <= 6

    hat.edit_gradients, hat.after_step = edited, stepped  # type: ignore[method-assign]
    experiment.run()
    assert 6 in seen
    assert len(seen) == 16 + 8


# -- what it refuses ----------------------------------------------------------------------------------------------------


def test_a_task_that_comes_back_is_refused() -> None:
    stream = TinyStream(scenario="domain_incremental")
    learner = make_learner(stream, {"hat": make()})
    learner.build(stream[0].info)
    learner.build(stream[0].info)
    with pytest.raises(ClplatformError, match="task 0 comes back"):
        learner.build(stream[1].info)


def test_it_keeps_embeddings_adapters_and_a_byte_for_each_unit() -> None:
    stream = TinyStream(scenario="task_incremental")
    for backbone, units, adapters in ((perceptron(), 40, 0), (tiny_vit(), 14, 2 * (16 * 7 + 7 + 7 * 16))):
        hat = make(adapter_units=7)
        learner = make_learner(stream, {"hat": hat}, backbone=backbone)
        for n in (1, 2):
            learner.build(stream[n - 1].info)
            assert hat.cost() == {"extra_parameters": n * units + adapters, "buffer_bytes": units}
