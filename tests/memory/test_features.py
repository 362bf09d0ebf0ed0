"""Features of a frozen backbone are found again, whatever else is in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prototypes import norm_backbone
from torch import Tensor
from world import TinyStream, make_learner

from clplatform.memory.features import FrozenFeatures
from clplatform.types import Batch


@pytest.fixture
def learner() -> Any:
    stream = TinyStream()
    learner = make_learner(stream, {}, backbone=norm_backbone())
    learner.build(stream[0].info)
    learner.backbone.requires_grad_(False)
    return learner


def by_hand(learner: Any, batch: Batch) -> Tensor:
    return learner.backbone.eval()(batch)


def test_rows_are_looked_up_in_any_order(learner: Any) -> None:
    data, found = TinyStream()[0].train, FrozenFeatures()
    learner.train()
    found.prepare(data)
    batch = data.fetch(torch.randperm(32, generator=torch.Generator().manual_seed(0)))
    assert learner.backbone.rows == []  # not before they are asked for
    features = found(learner, batch)
    assert sum(learner.backbone.rows) == 32
    assert torch.equal(found(learner, batch), features)
    assert sum(learner.backbone.rows) == 32
    torch.testing.assert_close(features, by_hand(learner, batch))
    assert not features.requires_grad
    features.zero_()  # a copy
    assert found(learner, batch).abs().min() > 0


def test_other_rows_pass_through_the_backbone_as_they_were_before_augmentation(learner: Any) -> None:
    """Rows of a memory that have the same index as rows of the stream, and rows that nobody knows."""
    stream, found = TinyStream(), FrozenFeatures()
    found.prepare(stream[0].train)
    own, replayed, strange = (stream[i].train.fetch(torch.arange(5)) for i in (0, 1, 2))
    replayed |= {"index": own["index"], "source": torch.full((5,), 2)}
    batch = {name: torch.cat([own[name], replayed[name], strange[name]]) for name in own}
    spoiled = {**batch, "pixel_values": torch.zeros(15, 1, 1, 12), "raw_pixel_values": batch["pixel_values"]}
    learner.train()
    found(learner, own)
    learner.backbone.rows.clear()
    features = found(learner, spoiled)
    assert learner.backbone.rows == [10]
    torch.testing.assert_close(features, by_hand(learner, batch))


def test_rows_that_do_not_say_where_they_are_from_are_not_looked_up(learner: Any) -> None:
    """A memory's own rows, before they are part of a batch."""
    stream, found = TinyStream(), FrozenFeatures()
    found.prepare(stream[0].train)
    rows = stream[1].train.fetch(torch.arange(5))
    rows |= {"index": torch.arange(5)}
    del rows["source"]
    torch.testing.assert_close(found(learner, rows), by_hand(learner, rows))


def test_without_features_all_rows_pass(learner: Any) -> None:
    data, found = TinyStream()[0].train, FrozenFeatures()
    learner.train()
    batch = data.fetch(torch.arange(8))
    torch.testing.assert_close(found(learner, batch), by_hand(learner, batch))
    found.prepare(data)
    found(learner, batch)
    assert found.features.shape == (32, 16)
    found.clear()
    assert found.features.numel() == 0
    torch.testing.assert_close(found(learner, batch), by_hand(learner, batch))


def test_two_versions_of_one_sample_are_not_looked_up(learner: Any) -> None:
    stream, found = TinyStream(), FrozenFeatures()
    a, b = stream[0].train, stream[1].train
    b.columns["index"] = a.columns["index"]  # type: ignore[attr-defined]
    found.prepare(a + b)
    batch = (a + b).fetch(torch.arange(64))
    torch.testing.assert_close(found(learner, batch), by_hand(learner, batch))
