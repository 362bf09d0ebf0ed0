"""Images read when they are needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from clplatform.data import Loader
from clplatform.stream.lazy import LazyImages, read_image, stack
from clplatform.types import ClplatformError


class Source:
    """Image i is filled with i; counts what is read."""

    def __init__(self, n: int = 6, sizes: tuple[int, ...] = (4,)) -> None:
        self.n, self.sizes, self.read = n, sizes, 0

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        self.read += 1
        size = self.sizes[i % len(self.sizes)]
        return Image.fromarray(np.full((size, size, 3), i, dtype=np.uint8)), i % 2


def lazy(source: Source, **options: object) -> LazyImages:
    labels = torch.arange(source.n) % 2
    columns = {"labels": labels, "task_labels": torch.zeros_like(labels), "index": torch.arange(100, 100 + source.n)}
    return LazyImages(source, columns, **options)  # type: ignore[arg-type]


def test_reads_only_what_a_batch_needs() -> None:
    source = Source()
    data = lazy(source).select(torch.tensor([5, 1, 3]))
    assert source.read == 0
    assert data.labels.tolist() == [1, 1, 1]
    batch = data.fetch(torch.tensor([2, 0]))
    assert source.read == 2
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3, 5]
    assert batch["index"].tolist() == [103, 105]
    assert batch["source"].tolist() == [0, 0]


def test_workers_give_the_same_batches() -> None:
    batches = [list(Loader(lazy(Source()), 4, shuffle=True, seed=1, num_workers=n)) for n in (0, 1)]
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_in_memory_and_concatenated_it_is_the_same() -> None:
    data = lazy(Source())
    rows = torch.tensor([4, 2])
    assert torch.equal(data.load().fetch(rows)["pixel_values"], data.fetch(rows)["pixel_values"])
    joined = data + data.select(torch.tensor([0]))
    assert joined.fetch(torch.tensor([6, 1]))["pixel_values"][:, 0, 0, 0].tolist() == [0, 1]


def test_images_of_different_sizes_need_a_size() -> None:
    with pytest.raises(ClplatformError, match=r"differ in size.*stream\.image_size"):
        lazy(Source(sizes=(4, 5))).fetch(torch.arange(2))
    assert lazy(Source(sizes=(4, 5)), size=(3, 3)).fetch(torch.arange(2))["pixel_values"].shape == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (torch.rand(3, 4, 5), (3, 4, 5)),
        (torch.rand(4, 5), (1, 4, 5)),
        (np.zeros((4, 5), dtype=np.uint8), (1, 4, 5)),
        (np.zeros((4, 5, 3), dtype=np.uint8), (3, 4, 5)),
        (Image.new("L", (5, 4)), (1, 4, 5)),
        (Image.new("RGBA", (5, 4)), (3, 4, 5)),
        (Image.new("P", (5, 4)), (3, 4, 5)),
    ],
)
def test_kinds_of_image(image: object, shape: tuple[int, ...]) -> None:
    assert tuple(read_image(image).shape) == shape


def test_resizing_keeps_the_kind_of_number() -> None:
    white = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    assert read_image(white, (7, 7)).unique().tolist() == [255]
    assert read_image(white, (7, 7)).dtype == torch.uint8
    assert stack([read_image(torch.ones(1, 4, 4), (2, 2))]).dtype == torch.float32
