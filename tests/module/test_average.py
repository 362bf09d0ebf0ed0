"""The moving average of a model against its closed form, and that nothing but `update` moves it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from world import TinyBackbone, TinyStream, make_learner

from clplatform.fitting import trainable
from clplatform.head.cosine import CosineHead
from clplatform.head.multi import MultiHead
from clplatform.module.average import Average
from clplatform.types import Batch


class NormBackbone(TinyBackbone):
    """With batch norm, dropout, and two names for one weight."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.norm = nn.BatchNorm1d(self.feature_size)
        self.twin = nn.Linear(self.feature_size, self.feature_size)
        self.again = nn.Linear(self.feature_size, self.feature_size)
        self.again.weight = self.twin.weight

    def forward(self, batch: Batch) -> Tensor:
        return self.again(self.norm(self.twin(super().forward(batch))))


def make(scenario: str = "class_incremental", *, n: int = 2, **options: Any) -> tuple[Any, Average, TinyStream]:
    """A learner built for the first experience, its average, and the stream."""
    stream = TinyStream(n, scenario=scenario)
    learner: Any = make_learner(stream, {}, **options)
    learner.build(stream[0].info)
    return learner, Average(learner), stream


def walk(learner: Any, average: Average, decay: float, n: int = 30) -> list[dict[str, Tensor]]:
    """Random weights, one set after the other, as if by steps; returns them all, the initial ones first."""
    generator = torch.Generator().manual_seed(3)
    path = [{k: v.clone() for k, v in learner.state_dict().items()}]
    for _ in range(n):
        with torch.no_grad():
            for t in [*learner.backbone.parameters(), *learner.backbone.buffers(), *learner.head.parameters()]:
                if t.is_floating_point():
                    t.copy_(torch.randn(t.shape, generator=generator))
                else:
                    t.add_(1)
        path.append({k: v.clone() for k, v in learner.state_dict().items()})
        learner.steps += 1
        average.update(learner, decay)
    return path


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_it_is_the_closed_form(decay: float) -> None:
    """Σ_k w_k θ_k: as long as α_t = 1 − 1/(t+1) the mean of what there was, then geometric."""
    learner, average, _ = make(backbone=NormBackbone())
    path = walk(learner, average, decay)
    weight = torch.zeros(len(path), dtype=torch.float64)
    weight[0] = 1
    for t in range(1, len(path)):
        alpha = min(t / (t + 1), decay)
        weight[: t + 1] = torch.cat([alpha * weight[:t], weight.new_tensor([1 - alpha])])
    if decay == 1.0:
        torch.testing.assert_close(weight, torch.full_like(weight, 1 / len(path)))
    if decay == 0.3:
        torch.testing.assert_close(weight[-5:], 0.7 * 0.3 ** torch.arange(4, -1, -1, dtype=torch.float64))
    found = average.state_dict()
    assert found.keys() == path[0].keys()
    for name, value in found.items():
        if value.is_floating_point():
            expected = sum(w * step[name].double() for w, step in zip(weight, path, strict=True))
            torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-5, msg=name)  # type: ignore[union-attr]
        else:
            assert torch.equal(value, path[-1][name])
    assert {name for name in found if "running" in name or "num_batches" in name} == {
        "backbone.norm.running_mean", "backbone.norm.running_var", "backbone.norm.num_batches_tracked",
    }  # fmt: skip


def test_it_stays_in_eval_mode_and_answers_without_gradients() -> None:
    learner, average, stream = make(backbone=NormBackbone())
    learner.extras["average"] = average
    for _ in range(2):
        learner.train()
        assert learner.backbone.dropout.training
        assert not any(m.training for m in average.modules())
        average.grow(learner)
    batch = stream[0].train.fetch(torch.arange(8))
    before = {k: v.clone() for k, v in average.state_dict().items()}
    output = average(learner, batch)
    assert not output.logits.requires_grad
    assert torch.equal(output.logits, average(learner, batch).logits)
    assert all(torch.equal(v, before[k]) for k, v in average.state_dict().items())


def test_nothing_trains_it() -> None:
    learner, average, _ = make()
    learner.extras["average"] = average
    assert not any(p.requires_grad for p in average.parameters())
    trained = {id(p) for group in learner.parameter_groups() for p in group["params"]}
    assert trained == {id(p) for p in [*learner.backbone.parameters(), *learner.head.parameters()]}
    with trainable(learner, "head"):  # a pattern that its names match too
        assert any(re.search("head", name) for name, _ in learner.extras.named_parameters())
        assert not any(p.requires_grad for p in average.parameters())
        assert learner.head.linear.weight.requires_grad


def test_it_shares_no_memory_with_the_learner() -> None:
    learner, average, _ = make(backbone=NormBackbone())
    theirs = {t.data_ptr() for t in learner.state_dict().values()}
    assert not theirs & {t.data_ptr() for t in average.state_dict().values()}
    assert average.backbone.again.weight is average.backbone.twin.weight


@pytest.mark.parametrize("head", ["tiny", "multi", "cosine"])
def test_a_grown_head_keeps_what_was_averaged(head: str) -> None:
    scenario = "task_incremental" if head == "multi" else "class_incremental"
    learner, _, stream = make(scenario)
    if head != "tiny":
        learner.make_head = lambda: (
            MultiHead(feature_size=16) if head == "multi" else CosineHead(feature_size=16, scale=3)
        )
        learner.head = learner.fresh_head()
    average = Average(learner)
    walk(learner, average, 0.5, n=3)
    before = copy.deepcopy(average.head.state_dict())
    learner.build(stream[1].info)
    average.grow(learner)
    average.grow(learner)  # once more changes nothing
    after, now = average.head.state_dict(), learner.head.state_dict()
    for name, old in before.items():
        n = len(old) if old.ndim else None
        assert torch.equal(after[name][:n] if n else after[name], old)
        assert not torch.equal(old, now[name][:n] if n else now[name])
        if n:
            assert len(after[name]) == len(now[name]) == 2 * n
            assert torch.equal(after[name][n:], now[name][n:])
    batch = stream[1].train.fetch(torch.arange(8))
    assert average(learner, batch).logits.shape == (8, 4)
    assert (average(learner, batch).logits[:, :2] == -1e4).all() == (head == "multi")


def test_in_place_of_the_learner_and_back_even_at_an_error() -> None:
    learner, average, stream = make()
    walk(learner, average, 0.9)
    batch = stream[0].train.fetch(torch.arange(8))
    own = learner(batch).logits
    parts = learner.backbone, learner.head
    with average.in_place_of(learner):
        assert torch.equal(learner(batch).logits, average(learner, batch).logits)
        assert not torch.equal(learner(batch).logits, own)
        assert learner.state_dict().keys() == average.state_dict().keys()
    assert (learner.backbone, learner.head) == parts
    with pytest.raises(ZeroDivisionError), average.in_place_of(learner):
        raise ZeroDivisionError
    assert (learner.backbone, learner.head) == parts
    assert torch.equal(learner(batch).logits, own)


def test_floats_are_those_of_its_state() -> None:
    _, average, _ = make()
    assert average.n_floats() == 12 * 16 + 16 + 16 * 2 + 2
