"""Experts: which one a sample goes to, by task id or by the nearest class mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_learner

from clplatform.module.experts import Experts


def experts_of(stream: Any) -> tuple[Any, Experts]:
    """A learner that has seen the whole stream, and experts for it."""
    learner, experts = make_learner(stream, {}), Experts(16)
    for experience in stream:
        learner.build(experience.info)
        experts.grow(experience.info)
    return learner, experts


def never() -> Tensor:
    raise AssertionError("features are not asked for")


def test_with_task_ids_the_latest_expert_of_a_task_answers() -> None:
    stream = TinyStream(3, scenario="task_incremental")
    learner, experts = experts_of(stream)
    batch = {"task_labels": torch.tensor([2, 0, 1, 2])}
    assert experts.choose(learner, batch, never).tolist() == [2, 0, 1, 2]
    last = stream[2].info
    object.__setattr__(last, "task_label", 0)  # task 0 comes back
    learner.build(last)
    assert experts.choose(learner, {"task_labels": torch.tensor([0, 1])}, never).tolist() == [2, 1]


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_without_task_ids_the_nearest_mean_decides_whatever_the_labels_of_tasks(scenario: str) -> None:
    learner, experts = experts_of(TinyStream(3, scenario=scenario))
    generator = torch.Generator().manual_seed(0)
    experts.means.copy_(torch.randn(6, 16, generator=generator))
    features = torch.randn(40, 16, generator=generator)
    expected = []
    for h in features:
        cosines = [float(h @ m / (h.norm() * m.norm())) for m in experts.means]
        expected.append(cosines.index(max(cosines)) // 2)
    assert set(expected) == {0, 1, 2}
    for labels in (torch.zeros(40), torch.arange(40)):
        found = experts.choose(learner, {"task_labels": labels.long()}, lambda: 3 * features)
        assert found.tolist() == expected


def test_means_are_of_normalised_features_of_each_class() -> None:
    stream = TinyStream(3)
    learner, experts = experts_of(stream)
    learner.batch_size = 5  # several batches
    learner.train()
    modes = []

    def bare(batch: Any) -> Tensor:
        modes.append(learner.training)
        return batch["pixel_values"].flatten(1)[:, :1] * torch.arange(1.0, 17) + batch["labels"][:, None]

    experts.learn_means(learner, stream[1], bare)
    assert set(modes) == {False}
    assert learner.training
    batch = stream[1].train.fetch(torch.arange(len(stream[1].train)))
    for k in (2, 3):
        rows = {name: column[batch["labels"] == k] for name, column in batch.items()}
        torch.testing.assert_close(experts.means[k], F.normalize(bare(rows), dim=1).mean(0))
    assert not experts.means[[0, 1, 4, 5]].any()


def test_nothing_of_it_decays() -> None:
    learner, experts = experts_of(TinyStream(2))
    learner.extras["experts"] = experts
    groups = experts.without_decay(learner.parameter_groups())
    decay = {id(p): g.get("weight_decay") for g in groups for p in g["params"]}
    assert len(decay) == sum(len(g["params"]) for g in groups) == len(list(learner.parameters()))
    assert all(decay[id(p)] == 0 for p in experts.parameters())
    assert decay[id(learner.backbone.layer.weight)] is None
    assert experts.n_floats() == 4 * (16 + 1) + 4 * 16
