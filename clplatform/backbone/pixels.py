"""From a stream's raw pixels to what a model expects: scaled, normalised, with its channels and size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pixels(nn.Module):
    """`pixel_values` [B, C, H, W] (uint8 0 … 255 or float 0 … 1) → float [B, channels, height, width].

    Args:
        mean, std: of each channel, of pixels scaled to 0 … 1.
        channels: the model's; one channel is repeated.
        size: the model's height and width; None: as they come. Other sizes are resampled (bilinear, antialiased).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, mean: Sequence[float], std: Sequence[float], channels: int, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        # The configuration tells them, so they are not saved with the weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = self.mean.dtype
        x = pixel_values.to(torch.promote_types(dtype, torch.float32))  # half precision would round, or not resample
        if pixel_values.dtype == torch.uint8:
            x = x / 255
        if self.size is not None and x.shape[2:] != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        if x.shape[1] == 1 and self.channels > 1:
            x = x.expand(-1, self.channels, -1, -1)
        return ((x - self.mean) / self.std).to(dtype)
