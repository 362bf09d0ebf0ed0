"""RWalk against a loop written out step by step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run
from stepwise import Named, anchor_of, distance, learner_name, walk
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.strategy.base import Strategy
from clplatform.strategy.rwalk import RWalk
from clplatform.types import Batch, Experience, Stage

STRENGTH, ALPHA, INTERVAL, DAMPING, NOISE = 0.3, 0.6, 3, 0.01, 1.5


def make() -> RWalk:
    strategy = from_page("rwalk", strength=STRENGTH, alpha=ALPHA, interval=INTERVAL, damping=DAMPING)
    assert isinstance(strategy, RWalk)
    return strategy


def grown(old: Named, like: Named) -> Named:
    """Zeros for the rows that are new."""
    return {n: torch.cat([old[n], torch.zeros(len(t) - len(old[n]), *t.shape[1:])]) for n, t in like.items()}


class ByHand:
    """λ Σ (F + s)(θ − θ*)², and the usual mistakes."""

    def __init__(self, mistake: str = "") -> None:
        self.mistake = mistake
        self.fisher: Named = {}
        self.score: Named = {}
        self.weight: Named = {}
        self.anchor: Named = {}

    def penalty(self, model: Model) -> Tensor:
        return (STRENGTH / 2 if self.mistake == "half" else STRENGTH) * distance(model, self.weight, self.anchor)

    def measure(self, model: Model, batch: Batch) -> None:
        """F ← α F̂ + (1 − α) F with F̂ sample by sample."""
        named = dict(model.named_parameters())
        new = {name: torch.zeros_like(p) for name, p in named.items()}
        rows = [torch.arange(8)] if self.mistake == "batch gradient" else [torch.tensor([i]) for i in range(8)]
        for row in rows:
            loss = F.cross_entropy(model(batch["pixel_values"][row]), batch["labels"][row])
            for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                new[name] += g**2 / len(rows)
        if self.fisher:
            old = grown(self.fisher, new)
            new = {name: ALPHA * f + (1 - ALPHA) * old[name] for name, f in new.items()}
        self.fisher = new

    def learn(self, model: Model, batches: list[Batch], **options: Any) -> None:
        gained = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        change, moved = (({name: torch.zeros_like(p) for name, p in gained.items()}) for _ in range(2))
        steps = 0

        def before(model: Model, batch: Batch) -> None:
            if steps == 0:
                self.measure(model, batch)

        def after(gradient: Named, step: Named) -> None:
            nonlocal steps
            for name in gained:
                change[name] -= gradient[name] * step[name]
                moved[name] += step[name]
            steps += 1
            if steps == INTERVAL:
                close_interval()

        def close_interval() -> None:
            nonlocal steps
            for name in gained:
                half = 1.0 if self.mistake == "no half in the distance" else 0.5
                gain = change[name] / (half * self.fisher[name] * moved[name] ** 2 + DAMPING)
                gained[name] += gain if self.mistake == "negative scores" else gain.clamp_min(0)
                change[name].zero_()
                moved[name].zero_()
            steps = 0

        walk(model, batches, self.penalty, before=before, after=after,
             penalised=self.mistake == "penalty in the path", **options)  # fmt: skip
        close_interval()
        if self.score and self.mistake != "only the latest score":
            old = grown(self.score, gained)
            gained = {name: (old[name] + s) / 2 for name, s in gained.items()}
        self.score = gained
        self.anchor = anchor_of(model)
        scale = [max(t.max().item() for t in named.values()) for named in (self.fisher, self.score)]
        if self.mistake == "not normalised":
            scale = [1.0, 1.0]
        self.weight = {name: f / scale[0] + self.score[name] / scale[1] for name, f in self.fisher.items()}


def learn(by_hand: ByHand, recorder: Recorder, **options: Any) -> Model:
    model = Model(recorder.before[0])
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        by_hand.learn(model, batches, **options)
    return model


# What the run is given, what the loop is given.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": ({}, {}),
    "adam, clipping": (
        {
            "optimizer": (adam := partial(torch.optim.AdamW, lr=0.02, weight_decay=0.5, eps=1e-3)),
            "trainer": {"gradient_clip_val": 0.2},
        },
        {"optimizer": adam, "clip": 0.2},
    ),
    "accumulation": ({"trainer": {"accumulate_grad_batches": 3}}, {"accumulate": 3}),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(kind: str, scenario: str, tmp_path: Path) -> None:
    """Intervals of 3 steps in experiences of 8 (or 4): the last one is shorter."""
    ours, theirs = OPTIONS[kind]
    rwalk, by_hand = make(), ByHand()
    experiment, recorder = run(tmp_path, "rwalk", rwalk, stream=TinyStream(noise=NOISE, scenario=scenario), **ours)
    close(learn(by_hand, recorder, **theirs), experiment.learner, rtol=1e-4, atol=1e-5)
    for name, weight in by_hand.weight.items():
        torch.testing.assert_close(rwalk.quadratic.weight[learner_name(name)], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "mistake",
    ["half", "penalty in the path", "batch gradient", "no half in the distance", "negative scores", "not normalised",
     "only the latest score"],
)  # fmt: skip
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    ours, theirs = OPTIONS["adam, clipping"]
    experiment, recorder = run(tmp_path, "rwalk", make(), stream=TinyStream(noise=NOISE), **ours)
    with pytest.raises(AssertionError, match="not close"):
        close(learn(ByHand(mistake), recorder, **theirs), experiment.learner, rtol=1e-4, atol=1e-5)


def test_importance_is_between_zero_and_two_and_new_rows_are_free(tmp_path: Path) -> None:
    rwalk = make()
    experiment, _ = run(tmp_path, "rwalk", rwalk, stream=TinyStream(2, noise=NOISE))
    weights = torch.cat([w.flatten() for w in rwalk.quadratic.weight.values()])
    assert weights.min() >= 0
    assert 1 <= weights.max() <= 2
    learner: Any = experiment.learner
    learner.build(TinyStream(3)[2].info)
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.3
            p.grad = None
    rwalk.quadratic.add_gradient(learner, 2 * STRENGTH)
    assert (learner.head.linear.weight.grad[4:] == 0).all()
    assert (learner.head.linear.weight.grad[:4] != 0).any()


def test_dropout_is_off_and_batch_norm_untouched_where_fisher_is_measured(tmp_path: Path) -> None:
    """Measured in the middle of a step, it leaves no trace: the first experience is fine-tuning, to the bit."""
    rwalk, stream = make(), TinyStream(1)
    plain = make_experiment(tmp_path / "a", {"finetuning": from_page("finetuning")}, stream=stream, dropout=0.3)
    walked = make_experiment(tmp_path / "b", {"rwalk": rwalk}, stream=stream, dropout=0.3)
    for experiment in (plain, walked):
        backbone: Any = experiment.learner.backbone
        torch.manual_seed(1)
        backbone.layer = torch.nn.Sequential(backbone.layer, torch.nn.BatchNorm1d(16))
        experiment.run()
    a, b = plain.learner.state_dict(), walked.learner.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (rwalk.fisher["backbone.layer.0.weight"] > 0).any()


class TwoStages(Strategy):
    """After RWalk in the chain: the classifier first, then everything; the scores as a stage begins."""

    def __init__(self, rwalk: RWalk) -> None:
        self.rwalk = rwalk
        self.gained: list[Named] = []

    def stages(self, learner: Any, experience: Experience) -> list[Stage]:
        return [Stage("head", max_epochs=1, trainable="head"), Stage("all", max_epochs=1)]

    def before_stage(self, learner: Any, experience: Experience, stage: Stage) -> None:
        self.gained.append(dict(self.rwalk.gained))


def test_an_interval_ends_with_its_stage_since_other_parameters_may_be_trained_then(tmp_path: Path) -> None:
    rwalk = from_page("rwalk", interval=100)
    assert isinstance(rwalk, RWalk)
    two = TwoStages(rwalk)
    make_experiment(tmp_path, {"rwalk": rwalk, "two": two}, stream=TinyStream(1)).run()
    assert [set(gained) for gained in two.gained] == [set(), {"head.linear.weight", "head.linear.bias"}]
    bias = two.gained[1]["head.linear.bias"]
    assert (bias > 0).any()
    assert (rwalk.score["head.linear.bias"] >= bias).all()
    assert (rwalk.score["backbone.layer.weight"] > 0).any()
