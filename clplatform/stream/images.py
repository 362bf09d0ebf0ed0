"""Image streams: split by classes, permuted pixels, rotated images; and images for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from clplatform.data import TensorData, Transform, derive_seed
from clplatform.stream.augmentation import Kind, augmentation
from clplatform.stream.base import (
    InMemoryStream,
    make_experiences,
    plan_classes,
    split_validation,
    task_label,
)
from clplatform.stream.image_files import LOADERS
from clplatform.types import Batch, ClplatformError, InputSpec, Scenario, StreamInfo


@dataclass
class Images:
    """A labelled image data set: uint8 images [N, C, H, W], labels int64 [N]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: Sequence[str]

    def spec(self) -> InputSpec:
        """Shape, mean and standard deviation (of pixels scaled to 0 … 1) of the training images."""
        x = self.train[0][:10_000].float() / 255
        dims = (0, 2, 3)
        mean, std = tuple(x.mean(dims).tolist()), tuple(x.std(dims).clamp_min(1e-3).tolist())
        c, h, w = self.train[0].shape[1:]
        return InputSpec("image", shape=(c, h, w), mean=mean, std=std)


def split_images(
    *,
    name: str,
    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet"],
    scenario: Scenario,
    n_experiences: int,
    class_order: list[int] | None,
    seed: Annotated[int, Ge(0)] | None,
    data_dir: str | None,
    validation_fraction: Annotated[float, Ge(0), Lt(1)],
    augment: Kind,
) -> InMemoryStream:
    """Disjoint classes in each experience (Split MNIST and its kin).

    Args:
        scenario: class-, task- or domain-incremental; in the last a label is the class's place within its experience.
        class_order: original classes in the order of appearance; None: by `seed`.
        seed: shuffles the classes, and fixes the validation split; None: the natural order.
        data_dir: folder with the published files; None: `$CLPLATFORM_DATA/<dataset>`, else a download.
        validation_fraction: of the training data of each class.

    Raises:
        ClplatformError: the data is missing, or the numbers do not fit.
    """
    check_classes(dataset, n_experiences)
    images = load_images(dataset, data_dir)
    plan = plan_classes(
        images.class_names, n_experiences, scenario=scenario, seed=seed, class_order=class_order, what=dataset
    )
    columns = _columns(images)
    parts, classes = [], []
    for i, group in enumerate(plan.groups):
        part = {}
        for split, (x, y, index) in columns.items():
            rows = torch.isin(y, torch.tensor(group)).nonzero()[:, 0]
            labels = plan.number_of[y]
            shared = {"pixel_values": x, "labels": labels, "index": index}
            shared["task_labels"] = torch.full_like(labels, task_label(scenario, i))
            part[split] = TensorData(shared, rows=rows)
        parts.append(_with_validation(part, validation_fraction, seed))
        classes.append(tuple(sorted(plan.number_of[group].tolist())))
    names = [
        " ".join(images.class_names[c] for c in g) if len(g) <= 3 else f"experience {i + 1}"
        for i, g in enumerate(plan.groups)
    ]
    return _stream(name, scenario, images, parts, classes, plan.class_names, seed, augment, names)


def transformed_images(
    *,
    name: str,
    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet"],
    transform: Literal["permutation", "rotation"],
    scenario: Literal["domain_incremental", "task_incremental"],
    n_experiences: Annotated[int, Ge(1)],
    max_angle: Annotated[float, Ge(0)],
    seed: Annotated[int, Ge(0)] | None,
    data_dir: str | None,
    validation_fraction: Annotated[float, Ge(0), Lt(1)],
    augment: Kind,
) -> InMemoryStream:
    """All classes in every experience, each seen through another transform of the pixels.

    The first experience shows the images as they are; the others a random permutation of the pixels (Goodfellow et al.
    2013; Kirkpatrick et al. 2017) or a rotation by an angle that grows evenly to `max_angle` degrees (Lopez-Paz &
    Ranzato 2017 draw it at random). Images are transformed when fetched, so memory does not grow with experiences.
    """
    images = load_images(dataset, data_dir)
    pixels = images.train[0][0].numel()
    generator = torch.Generator().manual_seed(derive_seed(seed or 0, "transforms"))
    columns, k = _columns(images), len(images.class_names)
    parts, names = [], []
    for i in range(n_experiences):
        if transform == "permutation":
            function, what = _permute(torch.randperm(pixels, generator=generator)), f"permutation {i}"
        else:
            angle = max_angle * i / max(1, n_experiences - 1)
            function, what = _rotate(angle), f"{angle:.0f}°"
        part = {}
        for split, (x, y, index) in columns.items():
            shared = {"pixel_values": x, "labels": y, "index": index}
            shared["task_labels"] = torch.full_like(y, task_label(scenario, i))
            part[split] = TensorData(shared, transform=None if i == 0 else function)
        parts.append(_with_validation(part, validation_fraction, seed))
        names.append("original" if i == 0 else what)
    classes = [tuple(range(k))] * n_experiences
    return _stream(name, scenario, images, parts, classes, tuple(images.class_names), seed, augment, names)


def check_classes(dataset: str, n_experiences: int) -> None:
    """Refuse a number of experiences before any file is read."""
    if n_experiences < 1:
        raise ClplatformError(f"stream.n_experiences={n_experiences}: a stream has at least one experience")


def load_images(dataset: str, data_dir: str | None) -> Images:
    """The data set's images, from local files, or embedded, or downloaded."""
    train, test, names = LOADERS[dataset](data_dir)
    return Images(train, test, names)


def _columns(images: Images) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and sample ids that are unique over both splits."""
    n, m = len(images.train[1]), len(images.test[1])
    return {"train": (*images.train, torch.arange(n)), "test": (*images.test, torch.arange(n, n + m))}


def _with_validation(part: dict[str, TensorData], fraction: float, seed: int | None) -> dict[str, TensorData | None]:
    train = part["train"]
    if fraction == 0:
        return {**part, "validation": None}
    kept, held_out = split_validation(train.labels, fraction, seed)
    return {**part, "train": train.select(kept), "validation": train.select(held_out) if len(held_out) else None}


def _stream(
    name: str, scenario: Scenario, images: Images, parts: list[dict[str, TensorData | None]],
    classes: list[tuple[int, ...]], class_names: tuple[str, ...], seed: int | None, augment: Kind, names: list[str],
) -> InMemoryStream:  # fmt: skip
    info = StreamInfo(
        name=name,
        scenario=scenario,
        problem="classification",
        n_experiences=len(parts),
        classes_per_experience=tuple(len(c) for c in classes),
        class_names=class_names,
        seed=-1 if seed is None else seed,
        input=images.spec(),
        task_ids=scenario == "task_incremental",
    )
    return InMemoryStream(info, make_experiences(parts, classes, scenario, names), augmentation(augment))


def _permute(permutation: Tensor) -> Transform:
    def permute(batch: Batch) -> Batch:
        x = batch["pixel_values"]
        return {**batch, "pixel_values": x.flatten(1)[:, permutation].view_as(x)}

    return permute


def _rotate(degrees: float) -> Transform:
    angle = torch.deg2rad(torch.tensor(degrees))
    matrix = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    matrix = torch.cat([matrix, torch.zeros(2, 1)], dim=1)

    def rotate(batch: Batch) -> Batch:
        x = batch["pixel_values"]
        grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        turned = F.grid_sample(x.float(), grid, align_corners=False)
        return {**batch, "pixel_values": turned.round().to(x.dtype)}

    return rotate


def images_to_tensor(inputs: Any, spec: InputSpec) -> Tensor:
    """Image files, or an array, as a stream of this specification would hold them: uint8 [N, C, H, W].

    Args:
        inputs: paths; or an array or tensor [N, H, W] or [N, C, H, W], integers 0 … 255 or floats 0 … 1.

    Raises:
        ClplatformError: the input is no image, or its values are out of range.
    """
    assert spec.shape is not None
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    if isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], (str, Path)):
        return torch.stack([_read(Path(p), spec.shape) for p in inputs])
    x = torch.as_tensor(np.asarray(inputs) if not isinstance(inputs, Tensor) else inputs)
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4:
        raise ClplatformError(f"an array of images has the shape [N, H, W] or [N, C, H, W], not {list(x.shape)}")
    kind, top, x = ("floats", 1, x) if x.dtype.is_floating_point else ("integers", 255, x.long())
    if x.numel() and not (x.min() >= 0 and x.max() <= top):
        raise ClplatformError(f"images as {kind} lie in 0 … {top}; these reach from {x.min():g} to {x.max():g}")
    return _fit((x * (255 / top)).round().float(), spec.shape)


def _read(path: Path, shape: tuple[int, int, int]) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            array = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"))
    except FileNotFoundError:
        raise ClplatformError(f"there is no file {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ClplatformError(f"{path} is not an image that can be read ({error})") from None
    x = torch.from_numpy(array.copy())
    x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)
    return _fit(x[None].float(), shape)[0]


def _fit(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images [N, C', H', W'] (0 … 255) with the channels and size of `shape`, uint8."""
    if x.shape[1] != shape[0]:
        if (x.shape[1], shape[0]) not in ((1, shape[0]), (3, 1)):
            raise ClplatformError(f"the images have {x.shape[1]} channels, the model expects {shape[0]}")
        x = x.expand(-1, shape[0], -1, -1) if x.shape[1] == 1 else _luminance(x)
    if x.shape[2:] != shape[1:]:
        x = F.interpolate(x, size=shape[1:], mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def _luminance(x: Tensor) -> Tensor:
    """Grey [N, 1, H, W] of RGB [N, 3, H, W], as image files are turned grey (ITU-R BT.601)."""
    return torch.einsum("nchw,c->nhw", x, x.new_tensor([0.299, 0.587, 0.114]))[:, None]
