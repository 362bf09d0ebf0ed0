"""What is read from every layer: against a forward pass by hand, batch by batch and without padding."""

from __future__ import annotations

import pytest
import torch
from text_world import TinyTextStream, tiny_bert
from world import TinyStream, make_learner, tiny_vit

from clplatform.diagnosis.layers import FEATURES, pooled, read, some
from clplatform.strategy.base import Strategy
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import Output


def learner_of(stream, backbone=None, **strategies):
    learner = make_learner(stream, strategies or {"finetuning": Finetuning()}, backbone=backbone, batch_size=8)
    learner.build(stream[0].info)
    return learner


def test_layers_of_a_vision_transformer() -> None:
    stream = TinyStream()
    learner = learner_of(stream, tiny_vit())
    data = stream[0].test
    reading = read(learner, data, 5)
    assert list(reading.layers) == ["embeddings", "block 1", "block 2", FEATURES]
    states = []
    model = learner.backbone
    hooks = [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in model.blocks()[1:]]
    with torch.no_grad():
        output = learner.eval()(data.fetch(torch.arange(len(data))))
    for hook in hooks:
        hook.remove()
    for name, state in zip(("block 1", "block 2"), states, strict=True):
        state = state[0] if isinstance(state, tuple) else state
        torch.testing.assert_close(reading.layers[name], state.mean(1))
    torch.testing.assert_close(reading.features, output.features)
    torch.testing.assert_close(reading.logits, output.logits)
    assert reading.labels.equal(data.labels)
    assert list(reading.without_layers().layers) == [FEATURES]


def test_the_mode_and_the_count_of_operations_are_left_alone() -> None:
    stream = TinyStream()
    learner = learner_of(stream).train()
    read(learner, stream[0].test, 5)
    assert learner.training
    assert learner.backbone.training
    assert not learner.flops.rows


def test_padding_plays_no_part() -> None:
    stream = TinyTextStream()
    learner = learner_of(stream, tiny_bert())
    together, alone = (read(learner, stream[0].test, size) for size in (16, 1))
    assert list(together.layers) == ["embeddings", "block 1", FEATURES]
    for name, values in together.layers.items():
        torch.testing.assert_close(values, alone.layers[name], msg=name)


def test_tokens_in_front_of_a_text_count_and_padding_does_not() -> None:
    state = torch.tensor([[[8.0], [1.0], [3.0], [100.0]]])
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert pooled(state, batch).tolist() == [[4.0]]
    assert pooled(state[:, :2], {"attention_mask": torch.tensor([[1, 1, 0]])}).tolist() == [[4.5]]


def test_a_perceptron_s_layers_are_named_so() -> None:
    assert list(read(learner_of(TinyStream()), TinyStream()[0].test, 8).layers) == ["layer 1", FEATURES]


def test_a_strategy_that_splits_batches_has_features_only() -> None:
    class Halves(Strategy):
        def forward(self, learner, batch, run):
            n = len(batch["labels"]) // 2
            parts = [run({name: v[rows] for name, v in batch.items()}) for rows in (slice(n), slice(n, None))]
            return Output(*(torch.cat([getattr(p, name) for p in parts]) for name in ("logits", "features")))

    stream = TinyStream()
    assert list(read(learner_of(stream, halves=Halves()), stream[0].test, 8).layers) == [FEATURES]


def test_some_samples_are_spread_over_the_classes() -> None:
    data = TinyStream(per_class=16)[1].train
    data = data.select(torch.arange(20))  # 16 of one class, 4 of the other
    few = some(data, 10, "x")
    assert sorted(few.labels.bincount()[2:].tolist()) == [4, 6]
    assert few.fetch(torch.arange(10))["index"].equal(some(data, 10, "x").fetch(torch.arange(10))["index"])
    assert not few.fetch(torch.arange(10))["index"].equal(some(data, 10, "y").fetch(torch.arange(10))["index"])
    assert some(data, 20, "x") is data


@pytest.mark.parametrize("n", [1, 2, 3])
def test_some_of_any_number(n: int) -> None:
    assert len(some(TinyStream()[0].train, n, "x")) == n
