"""Images that stay where they are (files, another library's data set) and are read when a batch needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clplatform.data import ConcatData, TensorData
from clplatform.types import Batch, ClplatformError, Data, InputSpec


class LazyImages(Dataset):
    """Samples of a data set that gives (image, …) by position. `num_workers` processes read them side by side.

    Args:
        source: indexable; the first element of `source[i]` is an image (PIL, array, or tensor [C, H, W]).
        columns: `labels`, `task_labels` and `index`, int64 [N].
        size: height and width that images are resized to; None: they have one size already.
        rows: int64 [n], positions in the source; all of them by default.
    """

    def __init__(
        self,
        source: Any,
        columns: dict[str, Tensor],
        *,
        size: tuple[int, int] | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.source, self.columns, self.size = source, columns, size
        self.rows = torch.arange(len(columns["labels"])) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        return self.columns["labels"][self.rows]

    def fetch(self, rows: Tensor) -> Batch:
        """The samples at positions `rows` [B] as a batch, with `source` = 0."""
        rows = self.rows[rows]
        batch = {name: column[rows] for name, column in self.columns.items()}
        batch["pixel_values"] = stack([read_image(self.source[i][0], self.size) for i in rows.tolist()])
        batch["source"] = torch.zeros(len(rows), dtype=torch.int64)
        return batch

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.fetch(torch.tensor([row])).items()}

    def __getitems__(self, rows: list[int]) -> Batch:
        return self.fetch(torch.as_tensor(rows))

    def select(self, rows: Tensor) -> LazyImages:
        return LazyImages(self.source, self.columns, size=self.size, rows=self.rows[rows])

    def __add__(self, other: Data) -> ConcatData:  # type: ignore[override]
        return ConcatData([self, other])

    def load(self) -> TensorData:
        """The same samples in memory."""
        parts = [self.fetch(rows)["pixel_values"] for rows in torch.arange(len(self)).split(512)]
        columns = {name: column[self.rows] for name, column in self.columns.items()}
        return TensorData({**columns, "pixel_values": torch.cat(parts)})


def read_image(image: Any, size: tuple[int, int] | None = None) -> Tensor:
    """A PIL image, an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W] → [C, H, W], of its own kind of number.

    Args:
        size: height and width to resize to.
    """
    if isinstance(image, Tensor):
        x = image[None] if image.ndim == 2 else image
    else:
        if getattr(image, "mode", "RGB") not in ("L", "RGB"):
            image = image.convert("RGB")
        array = torch.from_numpy(np.array(image))
        x = array[None] if array.ndim == 2 else array.permute(2, 0, 1)
    if size is not None and tuple(x.shape[1:]) != size:
        resized = torch.nn.functional.interpolate(x[None].float(), size=size, mode="bilinear", antialias=True)[0]
        x = resized if x.dtype.is_floating_point else resized.round().clamp(0, 255).to(x.dtype)
    return x


def stack(images: list[Tensor]) -> Tensor:
    """Images [C, H, W] → [B, C, H, W].

    Raises:
        ClplatformError: they differ in size.
    """
    shapes = {tuple(x.shape) for x in images}
    if len(shapes) > 1:
        raise ClplatformError(
            f"the images differ in size ({', '.join(map(str, sorted(shapes)[:3]))}, …): give stream.image_size=<pixels>"
        )
    return torch.stack(images)


def spec_of(data: Data, name: str) -> InputSpec:
    """Shape, mean and standard deviation, from at most 1,000 images of the first experience."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:1000]
    x = data.fetch(rows)["pixel_values"]
    if x.ndim != 4:
        raise ClplatformError(f"stream={name}: samples of shape {list(x.shape[1:])} are not images [C, H, W]")
    scaled = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    c, h, w = x.shape[1:]
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3)).clamp_min(1e-3)
    return InputSpec("image", shape=(c, h, w), mean=tuple(mean.tolist()), std=tuple(std.tolist()))
