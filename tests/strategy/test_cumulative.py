"""Cumulative training goes on from the weights it has, on the union of all data so far."""

from __future__ import annotations

from pathlib import Path

import torch
from naive import Model, run, samples, train
from world import TinyStream, same, weights

from clplatform.strategy.cumulative import Cumulative


def test_equals_a_hand_written_loop_on_the_union(tmp_path: Path) -> None:
    stream = TinyStream()
    experiment, recorder = run(tmp_path, "cumulative", Cumulative(), stream=stream)
    model, union = Model(recorder.before[0]), []
    for experience, start, batches in zip(stream, recorder.before, recorder.batches, strict=True):
        union.append(experience.train.fetch(torch.arange(len(experience.train)))["index"])
        for epoch in torch.cat([b["index"] for b in batches]).view(2, -1):
            assert torch.equal(epoch.sort().values, torch.cat(union))
        model.grow(start)
        train(model, batches)
    assert same(model.named(), weights(experiment.learner))


def test_old_and_new_samples_are_mixed_and_keep_their_labels(tmp_path: Path) -> None:
    stream = TinyStream()
    _, recorder = run(tmp_path, "cumulative", Cumulative(), stream=stream)
    last = recorder.batches[-1]
    assert any(len(set((b["labels"] // 2).tolist())) == 3 for b in last)
    known = samples(stream)
    for batch in last:
        for i, x, y in zip(batch["index"], batch["pixel_values"], batch["labels"], strict=True):
            assert torch.equal(known[int(i)][0], x)
            assert known[int(i)][1] == int(y)


def test_weights_are_carried_over(tmp_path: Path) -> None:
    _, recorder = run(tmp_path, "cumulative", Cumulative())
    for before, after in zip(recorder.before[1:], recorder.after, strict=False):
        assert torch.equal(before["backbone.layer.weight"], after["backbone.layer.weight"])
        assert torch.equal(
            before["head.linear.weight"][: len(after["head.linear.weight"])], after["head.linear.weight"]
        )
