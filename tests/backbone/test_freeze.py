"""What is frozen stays as it is, to the bit, and nothing else does."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import image_encoder, images, text_encoder
from text_world import INPUT, TinyTextStream
from torch import Tensor, nn
from world import DIM, TinyStream, make_experiment, weights

from clplatform.backbone.freeze import Freezable, freeze_parts
from clplatform.backbone.mlp import MLP
from clplatform.module import lora
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import Batch, ClplatformError

# Decay and momentum reach parameters that have no gradient, if they are in the optimizer at all.
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def backbone(kind: str, freeze: Any) -> tuple[Any, Any]:
    """A backbone of three layers with dropout, and a stream for it."""
    if kind == "bert":
        return text_encoder(input=INPUT, freeze=freeze), TinyTextStream(2)
    stream = TinyStream(2)
    if kind == "mlp":
        torch.manual_seed(0)
        layers = {"hidden": [16, 16, 16, 16], "dropout": 0.1}
        return MLP(input=stream.info.input, name="mlp", freeze=freeze, **layers), stream
    config = {"image_size": [1, DIM], "patch_size": [1, 3], "hidden_dropout_prob": 0.1}
    vit = {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return image_encoder(input=stream.info.input, config={**vit, **config}, freeze=freeze), stream


def part_of(name: str) -> int:
    """Number of the part that a parameter belongs to: 0 the first; 99: what comes after the blocks."""
    words = name.split(".")
    if "embeddings" in words:
        return 0
    numbers = [int(word) for word in words if word.isdecimal()]
    if not numbers:
        return 99
    return numbers[0] if words[1] == "layers" else numbers[0] + 1


@pytest.mark.parametrize("freeze", ["none", 0, 2, 3, "all"])
@pytest.mark.parametrize("kind", ["vit", "bert", "mlp"])
def test_exactly_what_is_frozen_is_unchanged(kind: str, freeze: Any, tmp_path: Path) -> None:
    model, stream = backbone(kind, freeze)
    experiment = make_experiment(tmp_path, {"f": Finetuning()}, stream=stream, backbone=model, optimizer=ADAMW)
    if kind == "bert":
        assert experiment.learner.backbone is model
    before = weights(experiment.learner)
    experiment.run()
    after = weights(experiment.learner)
    names = [name for name in before if name.startswith("backbone.")]
    assert len({part_of(name) for name in names} - {99}) == 4
    for name in names:
        last = {"none": -1, "all": 99}.get(freeze, freeze)
        frozen = part_of(name) <= last
        # A key's bias moves all scores of a query alike: it has no gradient but rounding.
        if frozen or "key.bias" not in name:
            assert torch.equal(before[name], after[name]) == frozen, name
    rows = {n: t for n, t in before.items() if n.startswith("head.")}
    assert not any(torch.equal(t, after[n][: len(t)]) for n, t in rows.items())


@pytest.mark.parametrize("freeze", ["none", 3, "all"])
@pytest.mark.parametrize("kind", ["vit", "bert", "mlp"])
def test_frozen_parts_run_without_dropout(kind: str, freeze: Any) -> None:
    """A sample's features are the same in every pass where nothing is learned."""
    model, stream = backbone(kind, freeze)
    batch = stream[0].train.fetch(torch.arange(8))
    expected = model(batch)
    model.train()
    assert model.training
    assert torch.equal(model(batch), model(batch)) == (freeze != "none")
    assert torch.equal(model(batch), expected) == (freeze != "none")
    assert not model.eval().training


class Normed(Freezable):
    """A batch norm in a frozen part, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        freeze_parts(self, 0)

    def forward(self, batch: Batch) -> Tensor:
        return self.b(self.a(batch["x"]))

    def blocks(self) -> list[nn.Module]:
        return [self.a, self.b]


def test_statistics_of_a_frozen_batch_norm_do_not_move() -> None:
    model = Normed().train()
    model({"x": torch.arange(12.0).view(4, 3)})
    assert model.a.running_mean is not None and model.b.running_mean is not None
    assert not model.a.running_mean.any()
    assert model.b.running_mean.all()


def test_a_copy_has_its_own_frozen_parts() -> None:
    model = Normed()
    twin = copy.deepcopy(model)
    assert twin.frozen == [twin.a]
    twin.a.train()
    twin.train()
    assert not twin.a.training
    assert not model.a.training


def test_adapters_put_into_a_frozen_backbone_are_trained() -> None:
    model = image_encoder(freeze="all")
    lora.add_adapter(model, "a", rank=2, alpha=4, dropout=0.5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    lora.activate(model, ["a"])
    for p in lora.adapter_parameters(model, "a"):
        nn.init.normal_(p)
    model.train()
    x = {"pixel_values": images()}
    assert not torch.equal(model(x), model(x))  # the adapter's dropout is on, the rest is fixed
    lora.activate(model, None)
    assert torch.equal(model(x), model(x))


def test_parts_are_frozen_in_addition() -> None:
    model = text_encoder(freeze=0)
    freeze_parts(model, 2)
    freeze_parts(model, "none")
    frozen = {part_of(f"backbone.{name}") for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {0, 1, 2}


def test_more_blocks_than_there_are_cannot_be_frozen() -> None:
    with pytest.raises(ClplatformError, match=r"freeze=4: the backbone has 3 blocks .* give 0 … 3, or all"):
        text_encoder(freeze=4)
    with pytest.raises(NotImplementedError, match="Freezable does not name its parts"):
        freeze_parts(Freezable(), 0)
