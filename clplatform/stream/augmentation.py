"""Random augmentation of image batches, on tensors and on the batch's device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clplatform.types import Batch

Kind = Literal["none", "crop", "flip_crop"]
Augmentation = Callable[[Batch, torch.Generator], Batch]


def augmentation(kind: Kind, padding: int = 4) -> Augmentation | None:
    """`crop`: shift by up to `padding` pixels into a zero border; `flip_crop`: mirror half of the images too."""
    if kind == "none":
        return None

    def augment(batch: Batch, generator: torch.Generator) -> Batch:
        images = random_crop(batch["pixel_values"], padding, generator)
        if kind == "flip_crop":
            flip = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(3), images)
        return {**batch, "pixel_values": images}

    return augment


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """images [B, C, H, W], each shifted by its own offset of at most `padding` pixels."""
    b, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, b, 1), generator=generator).to(images.device)
    rows = top + torch.arange(h, device=images.device)
    columns = left + torch.arange(w, device=images.device)
    sample = torch.arange(b, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
