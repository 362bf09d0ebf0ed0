"""PGD against the ascent written out for a linear model, and against FGM, which it is in one step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import Bag, Written, close, learn, replay, run
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from world import make_experiment, make_learner, same, weights

from clplatform.module.perturbation import norms, perturbed
from clplatform.strategy.pgd import PGD
from clplatform.types import Batch

EPSILON, STEP, STRENGTH = 2.0, 0.9, 0.6


def make(**changes: Any) -> PGD:
    settings = {
        "epsilon": EPSILON,
        "steps": 3,
        "step_size": STEP,
        "start": "zero",
        "relative": False,
        "strength": STRENGTH,
    }
    strategy = from_page("pgd", **{**settings, **changes})
    assert isinstance(strategy, PGD)
    return strategy


def by_hand(model: Written, batch: Batch, steps: int = 3, mistake: str = "") -> Tensor:
    """Each sample by itself: a step of length α up its loss, then back into its ball."""
    r = torch.zeros(*batch["input_ids"].shape, 16)
    for _ in range(steps):
        g = model.uphill(batch, r)
        for i in range(len(r)):
            r[i] += STEP * g[i] / g[i].norm()
            if mistake != "no projection" and r[i].norm() > EPSILON:
                r[i] *= EPSILON / r[i].norm()
            if mistake == "projection of each token":
                r[i] *= (EPSILON / 4 / r[i].norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp_max(1)
    return r


@pytest.mark.parametrize("with_replay", [False, True])
def test_equals_a_hand_written_loop(with_replay: bool, tmp_path: Path) -> None:
    chain = [replay()] if with_replay else []
    experiment, recorder = run(tmp_path, *chain, ("pgd", make()))
    close(learn(recorder, by_hand, STRENGTH), experiment.learner)


@pytest.mark.parametrize(
    "mistake", [{"mistake": "no projection"}, {"mistake": "projection of each token"}, {"steps": 2}]
)
def test_usual_mistakes_would_be_seen(mistake: dict[str, Any], tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, ("pgd", make()))
    with pytest.raises(AssertionError, match="not close"):
        close(learn(recorder, partial(by_hand, **mistake), STRENGTH), experiment.learner)


@pytest.mark.parametrize("relative", [False, True])
def test_one_step_from_the_centre_is_fgm(relative: bool, tmp_path: Path) -> None:
    """Through a whole run of a Transformer with dropout."""
    one = make(steps=1, step_size=EPSILON, relative=relative)
    other = from_page("fgm", epsilon=EPSILON, strength=STRENGTH, relative=relative)
    pgd = make_text_experiment(tmp_path / "a", {"pgd": one}, stream=TinyTextStream(2))
    fgm = make_text_experiment(tmp_path / "b", {"fgm": other}, stream=TinyTextStream(2))
    for experiment in (pgd, fgm):
        for module in experiment.learner.backbone.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        experiment.run()
    for name, weight in weights(fgm.learner).items():
        torch.testing.assert_close(weights(pgd.learner)[name], weight, rtol=1e-4, atol=1e-6)


def test_more_steps_find_a_higher_loss(tmp_path: Path) -> None:
    experiment = make_text_experiment(tmp_path, {"finetuning": from_page("finetuning")}, stream=TinyTextStream(2))
    experiment.run()
    learner, batch = experiment.learner.eval(), TinyTextStream(2)[1].train.fetch(torch.arange(16))
    tries = [make(steps=k, step_size=0.5, epsilon=1.0) for k in (1, 2, 8)]
    found = [pgd.loss(learner, batch, learner(batch))["pgd"].item() for pgd in tries]
    assert found == sorted(found) and found[-1] > found[0]


def test_a_random_start_is_in_the_ball_and_differs_between_steps(tmp_path: Path) -> None:
    stream = TinyTextStream(2)
    learner = make_learner(stream, {"pgd": make()}, backbone=Bag())
    learner.build(stream[0].info)
    batch = stream[0].train.fetch(torch.arange(32))
    pgd, real = make(start="random"), batch["attention_mask"].bool()
    with perturbed(learner, batch) as passes:
        first, second = pgd.first(learner, passes), pgd.first(learner, passes)
    assert not torch.equal(first, second)
    assert (first[~real] == 0).all() and (first[real] != 0).all()
    assert norms(first).max() <= EPSILON
    # uniform in ± ε / √n: the length is about ε / √3, whatever the number of tokens
    torch.testing.assert_close(norms(first).mean(), torch.tensor(EPSILON / 3**0.5), rtol=0.05, atol=0)


def test_a_random_start_draws_from_the_learners_generator(tmp_path: Path) -> None:
    stream = TinyTextStream(2)
    a, b = (
        make_experiment(tmp_path / name, {"pgd": make(start="random")}, stream=stream, backbone=Bag()) for name in "ab"
    )
    a.run()
    torch.rand(5)
    b.run()
    assert same(weights(a.learner), weights(b.learner))
    other = make_experiment(tmp_path / "c", {"pgd": make()}, stream=stream, backbone=Bag())
    other.run()
    assert not same(weights(a.learner), weights(other.learner))
