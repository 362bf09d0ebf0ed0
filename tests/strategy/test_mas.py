"""MAS against a hand-written loop, sample-by-sample autograd, a closed form, and Avalanche's plugin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run, train
from stepwise import Named, anchor_of, distance
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream

from clplatform.strategy.mas import MAS, energy
from clplatform.types import IGNORED, MASKED, Batch, Data, Output

STRENGTH, NOISE = 0.02, 1.5


def make(**changes: Any) -> MAS:
    strategy = from_page("mas", **{"strength": STRENGTH, "samples": None, **changes})
    assert isinstance(strategy, MAS)
    return strategy


def sensitivity(model: Model, data: Data, classes: slice = slice(None), whole: bool = False) -> Named:
    """1/N Σ_n |∂‖f(x_n)‖²/∂θ|, sample by sample, or (`whole`: a usual mistake) of the mean."""
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    x = data.fetch(torch.arange(len(data)))["pixel_values"]
    for rows in [x] if whole else x.split(1):
        squares = (model(rows)[:, classes] ** 2).sum(1).mean()
        for name, g in zip(named, torch.autograd.grad(squares, list(named.values())), strict=True):
            total[name] += g.abs() * len(rows) / len(x)
    return total


class ByHand:
    """λ Σ Ω (θ − θ*)² with Ω summed over the experiences, and the usual mistakes."""

    def __init__(self, mistake: str = "") -> None:
        self.mistake = mistake
        self.omega: Named = {}
        self.anchor: Named = {}

    def __call__(self, model: Model, batch: Batch, logits: Tensor) -> Tensor:
        strength = STRENGTH / 2 if self.mistake == "half" else STRENGTH
        return F.cross_entropy(logits, batch["labels"]) + strength * distance(model, self.omega, self.anchor)

    def consolidate(self, model: Model, data: Data) -> None:
        new = sensitivity(model, data, whole=self.mistake == "batch gradient")
        if self.mistake != "only the latest":
            for name, old in self.omega.items():
                new[name][: len(old)] += old
        self.omega, self.anchor = new, anchor_of(model)


def learn(by_hand: ByHand, stream: TinyStream, recorder: Recorder) -> Model:
    model = Model(recorder.before[0])
    for experience, start, batches in zip(stream, recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches, by_hand)
        by_hand.consolidate(model, experience.train)
    return model


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    stream = TinyStream(noise=NOISE, scenario=scenario)
    experiment, recorder = run(tmp_path, "mas", make(), stream=stream)
    close(learn(ByHand(), stream, recorder), experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mistake", ["half", "batch gradient", "only the latest"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    stream = TinyStream(noise=NOISE)
    experiment, recorder = run(tmp_path, "mas", make(), stream=stream)
    with pytest.raises(AssertionError, match="not close"):
        close(learn(ByHand(mistake), stream, recorder), experiment.learner, rtol=1e-4, atol=1e-5)


def test_importance_of_the_classifier_in_closed_form(tmp_path: Path) -> None:
    """∂‖Vh + c‖²/∂c = 2 f and ∂‖Vh + c‖²/∂V = 2 f hᵀ."""
    mas, stream = make(), TinyStream(1)
    experiment, _ = run(tmp_path, "mas", mas, stream=stream, dropout=0.3)
    with torch.no_grad():
        output = experiment.learner.eval()(stream[0].train.fetch(torch.arange(32)))
    f, h = output.logits, output.features
    torch.testing.assert_close(mas.quadratic.weight["head.linear.bias"], (2 * f).abs().mean(0))
    expected = torch.einsum("nk,nd->kd", (2 * f).abs(), h.abs()) / 32
    torch.testing.assert_close(mas.quadratic.weight["head.linear.weight"], expected)


def test_with_task_ids_the_output_is_that_of_the_sample_s_task(tmp_path: Path) -> None:
    """Logits of other tasks are masked with a large number, which is no output."""
    mas, stream = make(), TinyStream(2, scenario="task_incremental")
    _, recorder = run(tmp_path, "mas", mas, stream=stream)
    first = sensitivity(Model(recorder.after[0]), stream[0].train)
    second = sensitivity(Model(recorder.after[1]), stream[1].train, slice(2, 4))
    torch.testing.assert_close(mas.quadratic.weight["backbone.layer.bias"], first["layer.bias"] + second["layer.bias"])
    expected = torch.cat([first["head.bias"], second["head.bias"][2:]])
    torch.testing.assert_close(mas.quadratic.weight["head.linear.bias"], expected)


def test_new_rows_of_the_head_are_free(tmp_path: Path) -> None:
    mas = make()
    experiment, _ = run(tmp_path, "mas", mas, stream=TinyStream(2, noise=NOISE))
    learner: Any = experiment.learner
    learner.build(TinyStream(3)[2].info)
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.3
    penalty = mas.loss(learner, {}, None)["mas"]  # type: ignore[arg-type]
    torch.testing.assert_close(penalty, STRENGTH * 0.09 * sum(w.sum() for w in mas.quadratic.weight.values()))
    (gradient,) = torch.autograd.grad(penalty, [learner.head.linear.weight])
    assert (gradient[4:] == 0).all()
    assert (gradient[:4] > 0).any()


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_agrees_with_avalanche_s_plugin(tmp_path: Path) -> None:
    """The real plugin in a loop over the same batches, with an importance from batches of one. Over two experiences:
    where it would average the importances of more, we sum."""
    from avalanche.training.plugins import MASPlugin

    stream = TinyStream(2, noise=NOISE)
    experiment, recorder = run(tmp_path, "mas", make(), stream=stream)
    model, plugin = Model(recorder.before[0]), MASPlugin(lambda_reg=STRENGTH)
    clock = SimpleNamespace(train_exp_counter=0)
    host: Any = SimpleNamespace(clock=clock, model=model, device=torch.device("cpu"), train_mb_size=1)

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        host.loss = F.cross_entropy(logits, batch["labels"])
        plugin.before_backward(host)
        return host.loss

    for i, (experience, start, batches) in enumerate(zip(stream, recorder.before, recorder.batches, strict=True)):
        model.grow(start)
        clock.train_exp_counter, host.optimizer = i, torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, batches, loss)
        batch = experience.train.fetch(torch.arange(len(experience.train)))
        samples = list(zip(batch["pixel_values"], batch["labels"], batch["task_labels"], strict=True))
        host.experience = SimpleNamespace(dataset=samples)
        plugin.after_training_exp(host)
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)


def test_of_a_text_the_tokens_that_are_predicted_count_and_of_classes_those_that_there_are() -> None:
    logits = torch.randn(1, 5, 4, requires_grad=True)
    labels = torch.tensor([[2, IGNORED, 0, 3, IGNORED]])
    masked = torch.where(torch.tensor([True, True, False, True]), logits, MASKED)
    found = energy(Output(masked, torch.zeros(0)), {"labels": labels})
    expected = sum(logits[0, t, k].item() ** 2 for t in (0, 2, 3) for k in (0, 1, 3))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    assert not gradient[0, [1, 4]].any() and not gradient[0, :, 2].any()
    alone = energy(Output(masked[:, 0], torch.zeros(0)), {"labels": labels[:, 0]})
    assert alone.item() == pytest.approx(sum(logits[0, 0, k].item() ** 2 for k in (0, 1, 3)), rel=1e-5)
