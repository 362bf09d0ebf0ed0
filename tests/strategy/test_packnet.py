"""PackNet: what an experience owns never changes again, and pruning is by size, written out in NumPy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import Recorder
from strategies import from_page
from torch import Tensor, nn
from world import DIM, TinyBackbone, TinyStream, make_experiment, make_learner

from clplatform.strategy.base import Strategy, n_bytes
from clplatform.strategy.packnet import PackNet
from clplatform.types import Batch, ClplatformError, Experience, Stage

NAME = "backbone.layer.weight"
OWNER = "extras.packnet.layer/weight"


class Stages(Strategy):
    """Before PackNet in the chain: the weights as the first stage leaves them, unpruned."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []

    def after_stage(self, learner: Any, experience: Experience, stage: Stage) -> None:
        if stage.name == "train":
            self.trained.append(learner.backbone.layer.weight.detach().clone())


class NormBackbone(TinyBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(self.feature_size)

    def forward(self, batch: Batch) -> Tensor:
        return self.norm(super().forward(batch))


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
}


def learn(folder: Path, optimizer: str = "sgd", **options: Any) -> tuple[Any, Recorder, Stages]:
    recorder, stages = Recorder(), Stages()
    chain = {"recorder": recorder, "stages": stages, "packnet": from_page("packnet", prune=0.5)}
    options = {"stream": TinyStream(scenario="task_incremental"), "optimizer": OPTIMIZERS[optimizer], **options}
    experiment = make_experiment(folder, chain, **options)
    experiment.run()
    return experiment, recorder, stages


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_owned_is_the_same_to_the_bit_ever_after(optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    experiment, recorder, _ = learn(tmp_path, optimizer, backbone=NormBackbone())
    for t, before in enumerate(recorder.after):
        for after in recorder.after[t + 1 :]:
            owned = (before[OWNER] > 0) & (before[OWNER] <= t + 1)
            assert torch.equal(before[NAME][owned], after[NAME][owned])
            assert torch.equal(before[OWNER][owned], after[OWNER][owned])
            for name in ("layer.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
                assert torch.equal(before[f"backbone.{name}"], after[f"backbone.{name}"]), name
            rows = 2 * t + 2
            assert torch.equal(before["head.linear.weight"], after["head.linear.weight"][:rows])
            assert torch.equal(before["head.linear.bias"], after["head.linear.bias"][:rows])
    matrix = experiment.results.matrix
    for t in range(3):
        assert {row[t] for row in matrix[t + 1 :]} == {matrix[t + 1][t]}
        assert matrix[t + 1][t] > 0.7
    assert not torch.equal(recorder.after[0][NAME], recorder.after[2][NAME])


def test_outputs_of_a_task_are_those_of_then_in_a_mixed_batch_too(tmp_path: Path) -> None:
    experiment, recorder, _ = learn(tmp_path)
    learner, stream = experiment.learner.eval(), experiment.stream
    parts = [e.test.fetch(torch.arange(len(e.test))) for e in stream]
    mixed = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    order = torch.randperm(len(mixed["labels"]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = learner({name: value[order] for name, value in mixed.items()}).logits[order.argsort()]
    for t, (part, then) in enumerate(zip(parts, recorder.after, strict=True)):
        features = (part["pixel_values"].flatten(1) @ then[NAME].T + then["backbone.layer.bias"]).tanh()
        expected = features @ then["head.linear.weight"].T + then["head.linear.bias"]
        found = logits[part["index"].new_tensor(range(len(features))) + t * len(features)]
        torch.testing.assert_close(found[:, 2 * t : 2 * t + 2], expected[:, 2 * t : 2 * t + 2])


def test_the_smallest_of_the_free_weights_are_pruned(tmp_path: Path) -> None:
    _, recorder, stages = learn(tmp_path)
    owner = np.zeros(16 * DIM, dtype=int)
    for t, (trained, after) in enumerate(zip(stages.trained, recorder.after, strict=True)):
        free = np.flatnonzero(owner == 0)
        size = np.abs(trained.numpy().ravel()[free])
        owner[free[np.argsort(size)[len(free) // 2 :]]] = t + 1
        np.testing.assert_array_equal(after[OWNER].numpy().ravel(), owner)
        assert (after[NAME].numpy().ravel()[owner == 0] == 0).all()
        assert (after[NAME].numpy().ravel()[owner > 0] != 0).all()
        retrained = after[NAME] != trained
        assert retrained.view(-1)[torch.from_numpy(owner == t + 1)].any()
    assert [int((owner == t).sum()) for t in range(4)] == [24, 96, 48, 24]


def test_two_bytes_are_kept_for_each_weight() -> None:
    stream, strategy = TinyStream(scenario="task_incremental"), from_page("packnet")
    make_learner(stream, {"packnet": strategy}).build(stream[0].info)
    assert strategy.cost() == {"buffer_bytes": 2 * 16 * DIM}
    assert n_bytes(strategy.cost()) == 2 * 16 * DIM


def test_a_task_that_comes_back_is_refused() -> None:
    stream, strategy = TinyStream(scenario="domain_incremental"), from_page("packnet")
    assert isinstance(strategy, PackNet)
    learner = make_learner(stream, {"packnet": strategy})
    learner.build(stream[0].info)
    learner.build(stream[0].info)
    with pytest.raises(ClplatformError, match="task 0 comes back"):
        learner.build(stream[1].info)
