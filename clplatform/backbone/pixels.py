"""From a stream's raw pixels to what a model expects: scaled, normalised, with its channels and size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.types import ClplatformError, InputSpec


class Pixels(nn.Module):
    """`pixel_values` [B, C, H, W] (uint8 0 … 255 or float 0 … 1) → float [B, channels, size, size].

    Args:
        mean, std: of each channel, of pixels scaled to 0 … 1.
        channels: the model's; one channel is repeated.
        size: the model's height and width; None: as they come.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, mean: Sequence[float], std: Sequence[float], channels: int, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values
        if x.dtype == torch.uint8:
            x = x.to(self.mean.dtype) / 255
        x = x.to(self.mean.dtype)
        if x.shape[1] == 1 and self.channels > 1:
            x = x.expand(-1, self.channels, -1, -1)
        if self.size is not None and x.shape[2:] != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        return (x - self.mean) / self.std


def require_modality(name: str, input: InputSpec, modality: str) -> None:
    """Refuse a stream that the backbone cannot read.

    Raises:
        ClplatformError: images for a text model or the other way round.
    """
    if input.modality != modality:
        fits = {"text": "bert_tiny, minilm, distilbert or bert_base", "image": "vit_tiny, vit_b16, deit_small or mlp"}
        raise ClplatformError(
            f"backbone={name} reads {modality}s, but the stream is made of {input.modality}s; "
            f"choose backbone={fits[input.modality]}"
        )
