"""Joint training is training a fresh model on the union of all data so far."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from naive import Model, Recorder, run, train
from world import TinyStream, make_experiment, same, weights

from clplatform.strategy.joint import Joint


@pytest.fixture
def stream() -> TinyStream:
    return TinyStream()


def test_every_experience_is_a_fresh_model_trained_on_the_union(stream: TinyStream, tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, "joint", Joint(), stream=stream, last=True)
    union = []
    for i, experience in enumerate(stream):
        union.append(experience.train.fetch(torch.arange(len(experience.train)))["index"])
        for epoch in torch.cat([b["index"] for b in recorder.batches[i]]).view(2, -1):
            assert torch.equal(epoch.sort().values, torch.cat(union))
        model = Model(recorder.before[i])
        train(model, recorder.batches[i])
        assert same(model.named(), recorder.after[i])
    assert same(recorder.after[-1], weights(experiment.learner))


def test_starts_from_the_initial_weights_with_a_head_that_knows_nothing(stream: TinyStream, tmp_path: Path) -> None:
    initial = weights(make_experiment(tmp_path / "a", {"joint": Joint()}).learner)
    _, recorder = run(tmp_path / "b", "joint", Joint(), stream=stream, last=True)
    for i, before in enumerate(recorder.before):
        for name in ("backbone.layer.weight", "backbone.layer.bias"):
            assert torch.equal(before[name], initial[name])
        if i > 0:
            old = recorder.after[i - 1]["head.linear.weight"]
            first = recorder.before[0]["head.linear.weight"]
            head = before["head.linear.weight"]
            assert head.shape[0] == 2 * (i + 1)
            assert not (head[: len(old)] == old).any()
            assert not (head[:2] == first).any()  # drawn anew, not the same draw
            assert head.abs().max() <= 16**-0.5  # PyTorch's initial range of a layer with 16 inputs


def test_pretrained_weights_are_what_it_returns_to(stream: TinyStream, tmp_path: Path) -> None:
    recorder = Recorder()
    experiment = make_experiment(tmp_path, {"joint": Joint(), "recorder": recorder}, stream=stream)
    pretrained = torch.randn_like(experiment.learner.backbone.layer.weight)
    with torch.no_grad():
        experiment.learner.backbone.layer.weight.copy_(pretrained)
    experiment.run()
    assert len(recorder.before) == 3
    assert all(torch.equal(before["backbone.layer.weight"], pretrained) for before in recorder.before)
