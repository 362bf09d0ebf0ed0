"""The perceptron against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import IMAGES, TEXTS, images

from clplatform.backbone.mlp import MLP
from clplatform.config import check_arguments
from clplatform.types import ClplatformError


def perceptron(**changes: Any) -> MLP:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"input": IMAGES, "name": "mlp", "hidden": [20, 7], "dropout": 0.0, "freeze": "none"}
    return MLP(**{**settings, **changes}).eval()


@torch.no_grad()
def test_linear_layers_with_relu_on_flattened_pixels() -> None:
    mlp, x = perceptron(), images()
    weights = dict(mlp.named_parameters())
    assert [tuple(w.shape) for w in weights.values()] == [(20, 192), (20,), (7, 20), (7,)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGES.mean, IMAGES.std))
    expected = ((x / 255 - mean) / std).flatten(1)
    for i in range(2):
        expected = (expected @ weights[f"layers.{i}.0.weight"].T + weights[f"layers.{i}.0.bias"]).clamp_min(0)
    found = mlp({"pixel_values": x})
    torch.testing.assert_close(found, expected)
    assert found.shape == (5, mlp.feature_size) == (5, 7)
    assert (found == 0).any() and (found > 0).any()


def test_dropout_acts_after_every_layer_while_training() -> None:
    mlp = perceptron(dropout=0.5, hidden=[400, 400])
    inside: list[torch.Tensor] = []
    mlp.layers[0].register_forward_hook(lambda m, i, out: inside.append(out))
    x = {"pixel_values": images(1)}
    before = mlp(x)
    assert torch.equal(mlp(x), before)
    mlp.train()
    after = mlp(x)
    assert not torch.equal(after, mlp(x))
    for plain, dropped in ((inside[0], inside[2]), (before, after)):
        active = plain > 0
        assert 0.3 < (dropped[active] == 0).float().mean() < 0.7
    kept = (inside[2] != 0) & (inside[0] > 0)
    torch.testing.assert_close(inside[2][kept], 2 * inside[0][kept])


def test_blocks_are_the_layers_and_are_frozen_from_the_first() -> None:
    mlp = perceptron(hidden=[5, 6, 7], freeze=1)
    assert len(mlp.blocks()) == 3
    assert [p.requires_grad for p in mlp.parameters()] == [False] * 4 + [True] * 2
    assert mlp.n_tokens == 1
    with pytest.raises(ClplatformError, match="freeze=3: the backbone has 2 blocks after its first part; give 0 … 2"):
        perceptron(hidden=[5, 6, 7], freeze=3)


def test_saved_it_needs_its_weights_only(tmp_path: Path) -> None:
    mlp = perceptron()
    mlp.save_assets(tmp_path)
    assert not list(tmp_path.iterdir())
    torch.manual_seed(1)
    again = MLP(
        input=IMAGES, name="mlp", hidden=[20, 7], dropout=0.0, freeze="none", load_weights=False, assets=tmp_path
    ).eval()
    again.load_state_dict(mlp.state_dict())
    assert torch.equal(again({"pixel_values": images()}), mlp({"pixel_values": images()}))


def test_text_is_refused() -> None:
    with pytest.raises(ClplatformError, match="backbone=mlp reads images, but the stream is made of texts"):
        perceptron(input=TEXTS)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden", []), ("hidden", [5, 0]), ("dropout", 1.0), ("freeze", -1), ("freeze", "some")]
)
def test_settings_out_of_range_are_refused(key: str, value: Any) -> None:
    settings = {"name": "mlp", "hidden": [4], "dropout": 0.0, "freeze": "none"}
    given = {"input", "load_weights", "assets"}
    check_arguments("backbone", MLP, settings, given)
    with pytest.raises(
        ClplatformError, match=rf"backbone\.{key}(\.\d)?={value!r}|backbone\.{key}={value}".replace("[", r"\[")
    ):
        check_arguments("backbone", MLP, {**settings, key: value}, given)
