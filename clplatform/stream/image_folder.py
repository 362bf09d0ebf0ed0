"""Labelled images in folders: one for each class, as torchvision's `ImageFolder` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clplatform.stream.augmentation import Kind, augmentation
from clplatform.stream.base import (
    InMemoryStream,
    check_one_test,
    make_experiences,
    plan_classes,
    split_test,
    split_validation,
    task_label,
)
from clplatform.stream.lazy import LazyImages, spec_of
from clplatform.stream.notes import left_out
from clplatform.stream.plain_text import others_in
from clplatform.types import ClplatformError, Data, Scenario, StreamInfo


def image_folder(
    *, name: str, train: str, validation: str | None, test: str | None, test_fraction: Annotated[float, Gt(0), Lt(1)] | None,
    image_size: Annotated[int, Ge(1)] | list[int] | None, channels: Literal[1, 3], in_memory: bool, scenario: Scenario,
    n_experiences: int, class_order: list[int] | None, seed: Annotated[int, Ge(0)] | None,
    validation_fraction: Annotated[float, Ge(0), Lt(1)], augment: Kind,
) -> InMemoryStream:  # fmt: skip
    """Images whose folder names their class: `train/cat/1.png`, …

    Args:
        train, validation, test: folders with a folder for each class. `train` may also hold them by split: `train`, and
            `val` (or `validation`) and `test` where it has them.
        test_fraction: of the training images of each class, which are tested on if there is no test folder.
        image_size: pixels that images are resized to: height and width, or both; None: they have one size already.
        channels: 1 (grey) or 3 (colour).
        in_memory: False: images are read when a batch needs them.
        class_order: classes in the order of appearance, as numbers of their names in alphabetical order.

    Raises:
        ClplatformError: a folder is missing, holds no images, or a class that is never trained on; an image cannot be read.
    """
    folders = split_folders(train, validation, test)
    check_one_test(folders.get("test"), test_fraction)
    notes: list[str] = []
    files = {split: list_images(folder, notes) for split, folder in folders.items()}
    names = sorted({label for _, label in files["train"]})
    plan = plan_classes(names, n_experiences, scenario=scenario, seed=seed, class_order=class_order, what=name)
    labels = {split: _labels(items, names, folders[split], folders["train"]) for split, items in files.items()}
    rows = {split: torch.arange(len(items)) for split, items in files.items()}
    if "test" not in rows:
        rows["train"], rows["test"] = split_test(labels["train"], test_fraction, seed, folders["train"])
    if "validation" not in rows and validation_fraction > 0:
        kept, held = split_validation(labels["train"][rows["train"]], validation_fraction, seed)
        rows["train"], rows["validation"] = rows["train"][kept], rows["train"][held]
    size = (image_size, image_size) if isinstance(image_size, int) else _pair(image_size)
    parts: list[dict[str, Data | None]] = [{"validation": None} for _ in plan.groups]
    first = dict(zip(files, [0, *torch.tensor([*map(len, files.values())]).cumsum(0).tolist()], strict=False))
    for split, own in rows.items():
        source = split if split in files else "train"  # which it is held out from
        images = Files([path for path, _ in files[source]], channels)
        number, index = plan.number_of[labels[source]], first[source] + torch.arange(len(files[source]))
        for i, group in enumerate(plan.groups):
            columns = {
                "labels": number,
                "task_labels": torch.full_like(number, task_label(scenario, i)),
                "index": index,
            }
            chosen = own[torch.isin(labels[source][own], torch.tensor(group))]
            data = LazyImages(images, columns, size=size, rows=chosen)
            parts[i][split] = None if not len(chosen) else data.load() if in_memory else data
    if lacking := [i + 1 for i, part in enumerate(parts) if part["test"] is None]:
        raise ClplatformError(f"stream={name}: experience {lacking[0]} has no test images")
    classes: list[tuple[int, ...]] = [tuple(sorted(plan.number_of[g].tolist())) for g in plan.groups]
    trained = parts[0]["train"]
    assert trained is not None
    info = StreamInfo(
        name=name,
        scenario=scenario,
        problem="classification",
        n_experiences=len(parts),
        classes_per_experience=tuple(map(len, classes)),
        class_names=plan.class_names,
        seed=-1 if seed is None else seed,
        input=spec_of(trained, name),
        task_ids=scenario == "task_incremental",
    )
    titles = [
        " ".join(names[c] for c in g) if len(g) <= 3 else f"experience {i + 1}" for i, g in enumerate(plan.groups)
    ]
    return InMemoryStream(info, make_experiences(parts, classes, scenario, titles), augmentation(augment), notes=notes)


INSIDE = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


def split_folders(train: str, validation: str | None, test: str | None) -> dict[str, str]:
    """The folder of each split that there is: those that are given, else those within `train`, if it holds one `train` with
    folders of classes."""
    given = {"train": train, "validation": validation, "test": test}
    root = Path(train).expanduser()
    if (root / "train").is_dir() and any(path.is_dir() for path in (root / "train").iterdir()):
        given["train"] = None
        for split, names in INSIDE.items():
            there = [str(root / name) for name in names if (root / name).is_dir()]
            given[split] = given[split] or (there[0] if there else None)
    return {split: folder for split, folder in given.items() if folder is not None}


def _labels(items: list[tuple[Path, str]], names: list[str], folder: str, trained: str) -> Tensor:
    """The class of every image, int64 [N].

    Raises:
        ClplatformError: one is never trained on.
    """
    number = {name: i for i, name in enumerate(names)}
    if unknown := sorted({label for _, label in items} - set(number)):
        raise ClplatformError(f"{folder}: the class {unknown[0]!r} has no training images in {trained}")
    return torch.tensor([number[label] for _, label in items])


def list_images(folder: str, notes: list[str]) -> list[tuple[Path, str]]:
    """Every image below a folder, with the name of the folder in it that it is in: its class.

    Args:
        notes: get one on files that are no images by their names.

    Raises:
        ClplatformError: there is no such folder, or no class in it has an image.
    """
    from torchvision.datasets import ImageFolder

    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ClplatformError(f"there is no folder {folder}: one with a folder of images for each class is needed")
    try:
        read = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError:
        read = None
    if read is None or not read.samples:
        raise ClplatformError(f"{folder} holds no images: a folder of image files is needed for each class")
    found = [(Path(path), read.classes[k]) for path, k in read.samples]
    notes += left_out(
        f"files of {root.name} that are no images by their names", others_in(root, [p for p, _ in found]), root
    )
    return found


class Files:
    """Image files by position, read when asked for.

    Args:
        channels: 1 (grey) or 3 (colour).
    """

    def __init__(self, paths: list[Path], channels: int) -> None:
        self.paths, self.mode = paths, "L" if channels == 1 else "RGB"

    def __getitem__(self, i: int) -> tuple[Image.Image]:
        try:
            with Image.open(self.paths[i]) as image:
                return (image.convert(self.mode),)
        except (UnidentifiedImageError, OSError) as error:
            raise ClplatformError(f"{self.paths[i]} is not an image that can be read ({error})") from None


def _pair(size: list[int] | None) -> tuple[int, int] | None:
    """Height and width."""
    if size is None:
        return None
    if len(size) != 2 or min(size) < 1:
        raise ClplatformError(f"stream.image_size={size}: give pixels: one number, or [height, width]")
    return size[0], size[1]
