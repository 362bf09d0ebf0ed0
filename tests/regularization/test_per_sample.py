"""Magnitudes of per-sample gradients: the two ways, batches, and what must stay as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from world import TinyStream, make_learner

from clplatform.regularization import per_sample as module
from clplatform.regularization.per_sample import mean_over_batch, mean_over_data
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import Batch, Output

Named = dict[str, Tensor]


@pytest.fixture
def learner() -> Any:
    stream = TinyStream()
    learner = make_learner(stream, {"finetuning": Finetuning()}, dropout=0.3)
    for e in stream.experiences[:2]:
        learner.build(e.info)
    return learner


def cube(output: Output, row: Batch) -> Tensor:
    """Something that is neither a loss nor a norm, and looks at the row."""
    return (output.logits**3).sum() * (1 + row["labels"][0])


def by_hand(learner: Any, rows: list[Batch]) -> Named:
    learner.eval()
    total = {name: torch.zeros_like(p) for name, p in learner.named_parameters()}
    for row in rows:
        gradients = torch.autograd.grad(cube(learner(row), row), list(learner.parameters()))
        for name, g in zip(total, gradients, strict=True):
            total[name] += g.abs() / len(rows)
    return total


def single(data: Any) -> list[Batch]:
    return [data.fetch(torch.tensor([i])) for i in range(len(data))]


def same(a: Named, b: Named) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])


@pytest.mark.parametrize("floats", [2**24, 1000, 1], ids=["one chunk", "some samples", "one sample"])
@pytest.mark.parametrize("way", ["by layers", "vectorised", "one by one"])
def test_equals_autograd_sample_by_sample(learner: Any, floats: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(module, "CHUNK_FLOATS", floats)
    learner.linear_failed = way == "vectorised"
    if way == "one by one":
        monkeypatch.setattr(module, "vmap", refuse)
    data = TinyStream()[1].train
    expected = by_hand(learner, single(data))
    learner.train()
    same(mean_over_data(learner, data, cube, torch.abs), expected)
    assert learner.linear_failed == (way != "by layers")
    assert getattr(learner, "vmap_failed", False) == (way == "one by one" and floats > 1)  # one sample is no vector
    same(mean_over_batch(learner, data.fetch(torch.arange(len(data))), cube, torch.abs), expected)


class Twice(nn.Module):
    """A layer that is used twice, so that a sample's gradient is a sum of two outer products."""

    def __init__(self, layer: nn.Linear, way: str) -> None:
        super().__init__()
        self.layer, self.way, self.feature_size = layer, way, layer.out_features

    def forward(self, batch: Batch) -> Tensor:
        x = batch["pixel_values"].flatten(1)
        if self.way == "called":
            return self.layer(x).tanh() + self.layer(x.flip(1))
        if self.way == "tied":
            return self.layer(x).tanh() @ self.layer.weight @ self.layer.weight.T
        return self.layer(torch.stack([x, x.flip(1)], 1)).tanh().sum(1)  # several vectors a sample


@pytest.mark.parametrize("way", ["called", "tied", "positions"])
def test_a_layer_that_is_not_used_once_is_seen(learner: Any, way: str) -> None:
    learner.backbone = Twice(learner.backbone.layer, way)
    data = TinyStream()[1].train
    batch = data.fetch(torch.arange(len(data)))
    same(mean_over_batch(learner, batch, cube, torch.abs), by_hand(learner, single(data)))
    assert learner.linear_failed


def test_columns_that_only_the_stream_s_rows_have_are_left_out(learner: Any) -> None:
    data = TinyStream()[1].train
    batch = data.fetch(torch.arange(8))
    batch["raw_pixel_values"] = batch["pixel_values"][:5]
    same(mean_over_batch(learner, batch, cube, torch.abs), by_hand(learner, single(data)[:8]))


def test_not_of_the_mean_gradient(learner: Any) -> None:
    """In a batch's mean gradient samples cancel."""
    batch = TinyStream()[1].train.fetch(torch.arange(32))
    learner.eval()
    loss = ((learner(batch).logits ** 3).sum(1) * (1 + batch["labels"])).mean()
    mean = torch.autograd.grad(loss, list(learner.parameters()))
    found = mean_over_batch(learner, batch, cube, torch.abs)
    assert sum(v.sum() for v in found.values()) > 1.1 * sum(g.abs().sum() for g in mean)


def test_the_model_and_its_modes_are_left_as_they_were(learner: Any) -> None:
    learner.backbone.layer = nn.Sequential(learner.backbone.layer, nn.BatchNorm1d(16))
    learner.train()
    learner.backbone.layer[1].eval()  # a frozen one
    before, state = {n: b.clone() for n, b in learner.named_buffers()}, torch.get_rng_state()
    mean_over_batch(learner, TinyStream()[0].train.fetch(torch.arange(8)), cube, torch.abs)
    assert learner.training
    assert learner.backbone.dropout.training
    assert not learner.backbone.layer[1].training
    assert all(torch.equal(before[n], b) for n, b in learner.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in learner.parameters())


def test_frozen_parameters_are_left_out(learner: Any) -> None:
    learner.backbone.layer.bias.requires_grad_(False)
    found = mean_over_batch(learner, TinyStream()[0].train.fetch(torch.arange(8)), cube, torch.abs)
    assert set(found) == {"backbone.layer.weight", "head.linear.weight", "head.linear.bias"}


def test_full_precision_inside_autocast(learner: Any) -> None:
    batch = TinyStream()[0].train.fetch(torch.arange(8))
    expected = mean_over_batch(learner, batch, cube, torch.abs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mean_over_batch(learner, batch, cube, torch.abs)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
