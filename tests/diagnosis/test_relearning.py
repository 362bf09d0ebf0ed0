"""Steps to relearn: counted as a loop by hand counts them, with the same weights; and what is not lost needs none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from world import TinyStream, make_experiment, make_learner, same, weights

from clplatform.data import Loader, derive_seed
from clplatform.diagnosis.relearning import obstacle, savings, steps_to_reach, target_of
from clplatform.evaluate import accuracy
from clplatform.strategy.base import Strategy
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import Output


def learner_of(stream: TinyStream):
    learner = make_learner(stream, {"finetuning": Finetuning()}, dropout=0.3, batch_size=8)
    for experience in stream:
        torch.manual_seed(0)
        learner.build(experience.info)
    return learner.eval()  # as a saved model is loaded


def by_hand(learner, experience, target: float, most: int, seed: int) -> int | None:
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    loader = Loader(experience.train, 8, shuffle=True, seed=derive_seed(seed, experience.index, "relearning"))
    step = 0
    torch.manual_seed(derive_seed(seed, "relearning", experience.index))
    while True:
        for batch in loader:
            step += 1
            optimizer.zero_grad()
            learner.train()
            torch.nn.functional.cross_entropy(learner(batch).logits, batch["labels"]).backward()
            optimizer.step()
            if accuracy(learner, experience.test, 32) >= target:
                return step
            if step == most:
                return None


@pytest.mark.parametrize(("index", "seed"), [(0, 0), (1, 0), (2, 1)])
def test_steps_are_those_of_a_loop_by_hand(index: int, seed: int) -> None:
    stream = TinyStream()
    ours, theirs = learner_of(stream), learner_of(stream)
    found, start = steps_to_reach(ours, stream, stream[index], 0.9, 15, seed, 32)
    assert start < 0.9
    assert found == by_hand(theirs, stream[index], 0.9, 15, seed)
    assert found is not None and 1 < found <= 10
    assert same(weights(ours), weights(theirs))


def test_a_level_that_is_not_reached(tmp_path: Path) -> None:
    stream = TinyStream()
    learner = learner_of(stream)
    assert steps_to_reach(learner, stream, stream[0], 1.1, 3, 0, 32)[0] is None


def test_what_is_known_needs_no_step(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, {"finetuning": Finetuning()})
    experiment.run()
    before = weights(experiment.learner)
    assert experiment.results.matrix[3][2] > 0.9
    assert steps_to_reach(experiment.learner, experiment.stream, experiment.stream[2], 0.9, 5, 0, 32)[0] == 0
    assert same(before, weights(experiment.learner))


def test_training_is_repeated_to_the_bit() -> None:
    stream = TinyStream()
    pair = [make_learner(stream, {"finetuning": Finetuning()}, dropout=0.5, batch_size=8) for _ in range(2)]
    for i, learner in enumerate(pair):
        torch.manual_seed(0)
        learner.build(stream[0].info)
        torch.manual_seed(i)  # whatever was drawn before
        steps_to_reach(learner, stream, stream[0], 1.1, 4, 0, 32)
    assert same(weights(pair[0]), weights(pair[1]))


def test_obstacles() -> None:
    class Answers(Strategy):
        def forward(self, learner, batch, run):
            output = run(batch)
            return Output(output.logits + torch.arange(output.logits.shape[1]), output.features)

    class Watches(Strategy):
        def forward(self, learner, batch, run):
            return run(batch)

    stream = TinyStream()
    for strategy, reason in ((Answers(), "mine answers with more than backbone and head"), (Watches(), None)):
        learner = make_learner(stream, {"mine": strategy}, batch_size=8)
        learner.build(stream[0].info)
        found = obstacle(learner, stream[0])
        assert found is None if reason is None else reason in found
        assert not learner.flops.rows
    learner.requires_grad_(False)
    assert "no part of the model is trained" in obstacle(learner, stream[0])


def test_targets_and_savings() -> None:
    assert target_of(0.8, 0.9, True) == pytest.approx(0.72)
    assert target_of(18.0, 0.9, False) == pytest.approx(20)
    assert savings(5, 20, 80) == (0.75, False)
    assert savings(30, 20, 80) == (-0.5, False)
    assert savings(20, None, 80) == (0.75, True)
    assert savings(None, 20, 80) == (None, False)
    assert savings(0, 0, 80) == (None, False)
