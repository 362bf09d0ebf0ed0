"""Pixels as a model expects them, against their formula and another library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoders import images
from PIL import Image

from clplatform.backbone.pixels import Pixels

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_scaled_and_normalised_by_channel() -> None:
    x = images(2, (3, 4, 5))
    found = Pixels(mean=MEAN, std=STD, channels=3)(x)
    for c in range(3):
        expected = (x[:, c].numpy().astype(np.float64) / 255 - MEAN[c]) / STD[c]
        np.testing.assert_allclose(found[:, c].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_bytes_and_floats_are_the_same_image() -> None:
    x, pixels = images(3), Pixels(mean=MEAN, std=STD, channels=3, size=(5, 7))
    assert torch.equal(pixels(x), pixels(x.float() / 255))


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (5, 3), (4, 4)])
def test_resampled_as_pillow_does(size: tuple[int, int]) -> None:
    x = images(2, (3, 8, 8))
    found = Pixels(mean=(0.0,) * 3, std=(1.0,) * 3, channels=3, size=size)(x)
    for image, resized in zip(x, found, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.asarray(pillow).copy()).permute(2, 0, 1)
        assert (resized * 255 - expected).abs().max() <= 1.01  # Pillow rounds twice


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    x = images(2)
    assert torch.equal(*(Pixels(mean=MEAN, std=STD, channels=3, size=size)(x) for size in (None, (8, 8))))


def test_a_grey_image_is_seen_by_every_channel() -> None:
    x = images(2, (1, 8, 8))
    grey = Pixels(mean=(0.5,), std=(0.25,), channels=1)(x)
    assert torch.equal(Pixels(mean=(0.5,), std=(0.25,), channels=3)(x), grey.repeat(1, 3, 1, 1))
    own = Pixels(mean=MEAN, std=STD, channels=3)(x)
    assert torch.equal(own, Pixels(mean=MEAN, std=STD, channels=3)(x.repeat(1, 3, 1, 1)))


def test_it_follows_the_model_s_precision_and_is_not_saved() -> None:
    pixels = Pixels(mean=MEAN, std=STD, channels=3, size=(4, 4))
    assert pixels.to(torch.bfloat16)(images()).dtype == torch.bfloat16
    assert not pixels.state_dict()
