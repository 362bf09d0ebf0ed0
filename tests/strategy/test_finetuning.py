"""Fine-tuning is a plain PyTorch loop, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from naive import Model, run, train
from world import TinyStream, same, weights

from clplatform.strategy.finetuning import Finetuning


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, "finetuning", Finetuning(), stream=TinyStream(scenario=scenario))
    model = Model(recorder.before[0])
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches)
    assert same(model.named(), weights(experiment.learner))


def test_every_epoch_is_the_experience_s_own_data_once_in_a_new_order(tmp_path: Path) -> None:
    stream = TinyStream()
    _, recorder = run(tmp_path, "finetuning", Finetuning(), stream=stream)
    for experience, batches in zip(stream, recorder.batches, strict=True):
        index = torch.cat([b["index"] for b in batches]).view(2, -1)  # two epochs
        expected = experience.train.fetch(torch.arange(len(experience.train)))["index"]
        assert not torch.equal(index[0], index[1])
        for epoch in index:
            assert not torch.equal(epoch, expected)
            assert torch.equal(epoch.sort().values, expected)


def test_costs_nothing_and_holds_nothing() -> None:
    assert Finetuning().cost() == {}
    assert Finetuning().state_dict() == {}
