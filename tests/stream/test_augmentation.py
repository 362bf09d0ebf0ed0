"""Random augmentation against a loop over images."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clplatform.stream.augmentation import augmentation, random_crop


def images(n: int = 5) -> torch.Tensor:
    return torch.arange(1, n * 3 * 6 * 7 + 1).view(n, 3, 6, 7)  # every pixel is unique and not zero


def shifts(image: torch.Tensor, padding: int) -> list[torch.Tensor]:
    """All crops of the padded image."""
    _, h, w = image.shape
    padded = F.pad(image, (padding,) * 4)
    return [padded[:, t : t + h, s : s + w] for t in range(2 * padding + 1) for s in range(2 * padding + 1)]


def test_none_is_no_augmentation() -> None:
    assert augmentation("none") is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_is_a_shift_of_each_image_by_its_own_offset(dtype: torch.dtype) -> None:
    x = (images() % 200).to(dtype)
    y = random_crop(x, 2, torch.Generator().manual_seed(0))
    assert y.dtype == dtype and y.shape == x.shape
    places = [[i for i, s in enumerate(shifts(a, 2)) if torch.equal(s, b)] for a, b in zip(x, y, strict=True)]
    assert all(len(p) == 1 for p in places)
    assert len({p[0] for p in places}) > 1


def test_every_offset_occurs() -> None:
    x = images(1)
    generator = torch.Generator().manual_seed(0)
    found = {tuple(random_crop(x, 1, generator).flatten().tolist()) for _ in range(200)}
    assert found == {tuple(s.flatten().tolist()) for s in shifts(x[0], 1)}


def test_flipping_mirrors_about_half_of_the_images_left_to_right() -> None:
    augment = augmentation("flip_crop", padding=0)
    assert augment is not None
    x = images(200)
    y = augment({"pixel_values": x}, torch.Generator().manual_seed(0))["pixel_values"]
    same = (y == x).flatten(1).all(1)
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 70 < int(mirrored.sum()) < 130


def test_augmentation_depends_on_its_generator_only_and_keeps_other_columns() -> None:
    augment = augmentation("crop")
    assert augment is not None
    batch = {"pixel_values": images(), "labels": torch.arange(5)}
    before = batch["pixel_values"].clone()
    a, b = (augment(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    other = augment(batch, torch.Generator().manual_seed(4))
    assert torch.equal(a["pixel_values"], b["pixel_values"])
    assert not torch.equal(a["pixel_values"], other["pixel_values"])
    assert torch.equal(a["labels"], batch["labels"])
    assert torch.equal(batch["pixel_values"], before)  # stored samples are left as they are
