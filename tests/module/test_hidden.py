"""Hidden states against Hugging Face's own, for every kind of encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import IMAGE_MODELS, IMAGES, TEXT_MODELS, image_encoder, images, text_encoder, texts
from world import TinyBackbone, tiny_vit

from clplatform.backbone.mlp import MLP
from clplatform.module.hidden import capture, linear_blocks


@pytest.mark.parametrize("name", [*IMAGE_MODELS, *TEXT_MODELS])
@torch.no_grad()
def test_they_are_what_the_library_says(name: str) -> None:
    encoder: Any = image_encoder(name) if name in IMAGE_MODELS else text_encoder(name)
    batch = {"pixel_values": images()} if name in IMAGE_MODELS else texts()
    with capture(encoder.blocks()) as states:
        features = encoder(batch)
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    if name in IMAGE_MODELS:
        inputs = {"pixel_values": encoder.pixels(batch["pixel_values"]), **encoder.options}
    expected = encoder.model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == len(encoder.blocks())
    for found, state in zip(states[:-1], expected[:-1], strict=True):  # the library's last may be normalised
        assert torch.equal(found, state)
    assert states[-1].shape == expected[-1].shape
    assert torch.equal(encoder(batch), features)
    assert len(states) == len(expected)  # outside, nothing is added


@torch.no_grad()
def test_of_a_perceptron_they_are_the_layers_outputs() -> None:
    mlp = MLP(input=IMAGES, name="mlp", hidden=[6, 5, 4], dropout=0.0, freeze="none").eval()
    with capture(mlp.blocks()) as states:
        features = mlp({"pixel_values": images()})
    x, expected = mlp.pixels(images()).flatten(1), []
    for layer in mlp.layers:
        x = layer(x)
        expected.append(x)
    assert [s.shape[1] for s in states] == [6, 5, 4]
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    assert torch.equal(states[-1], features)


def test_which_backbones_are_perceptrons() -> None:
    mlp = MLP(input=IMAGES, name="mlp", hidden=[6, 5], dropout=0.0, freeze="none")
    tiny = TinyBackbone()
    assert linear_blocks(mlp) == [mlp.layers[0][0], mlp.layers[1][0]]
    assert linear_blocks(tiny) == [tiny.layer]
    assert linear_blocks(tiny_vit()) is None
    tiny.more = torch.nn.Linear(2, 2)  # parameters outside of the blocks
    assert linear_blocks(tiny) is None
