"""Images in folders: what is read, what is tested on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clplatform.stream.base import InMemoryStream
from clplatform.stream.image_folder import image_folder
from clplatform.types import ClplatformError

OPTIONS: dict[str, Any] = {
    "name": "mine", "train": "train", "validation": None, "test": "test", "test_fraction": None, "image_size": None,
    "channels": 3, "in_memory": True, "scenario": "class_incremental", "n_experiences": 2, "class_order": None, "seed": None,
    "validation_fraction": 0.0, "augment": "none",
}  # fmt: skip
CLASSES = ("ant", "bee", "cat", "dog")


def colour(name: str, i: int) -> tuple[int, int, int]:
    return 50 * (ord(name[0]) - ord("a")), i, 7


def write(folder: str, n: int, names: tuple[str, ...] = CLASSES, size: tuple[int, int] = (6, 4)) -> None:
    for name in names:
        (Path(folder) / name / "deeper").mkdir(parents=True)
        for i in range(n):
            place = Path(folder) / name / ("deeper" if i % 2 else ".") / f"{i}.png"
            Image.new("RGB", size, colour(name, i)).save(place)


@pytest.fixture(autouse=True)
def _files() -> None:
    write("train", 10)
    write("test", 3)


def made(**options: Any) -> InMemoryStream:
    return image_folder(**OPTIONS | options)


def refusal(**options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        made(**options)
    return str(caught.value)


def seen(data: Any) -> set[tuple[int, ...]]:
    """Label, and the colour of every image."""
    batch = data.fetch(torch.arange(len(data)))
    return {(k, *x[:, 0, 0].tolist()) for k, x in zip(batch["labels"].tolist(), batch["pixel_values"], strict=True)}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_is_a_class(in_memory: bool) -> None:
    stream = made(in_memory=in_memory, class_order=[2, 0, 1, 3])
    assert stream.info.class_names == ("cat", "ant", "bee", "dog")
    assert [e.name for e in stream] == ["cat ant", "bee dog"]
    assert stream.info.input.shape == (3, 4, 6)
    ids: list[int] = []
    for e in stream:
        names = [stream.info.class_names[c] for c in e.classes]
        for data, n in ((e.train, 10), (e.test, 3)):
            expected = {(k, *colour(c, i)) for k, c in zip(e.classes, names, strict=True) for i in range(n)}
            assert seen(data) == expected
            batch = data.fetch(torch.arange(len(data)))
            assert batch["pixel_values"].dtype == torch.uint8
            ids += batch["index"].tolist()
        assert e.validation is None
    assert len(set(ids)) == 52
    assert stream.notes == []
    mean = torch.tensor([[*colour(c, i)] for c in ("cat", "ant") for i in range(10)]).float().mean(0) / 255
    assert stream.info.input.mean == pytest.approx(mean.tolist(), abs=1e-6)


def test_scenarios() -> None:
    assert [e.task_label for e in made(scenario="task_incremental")] == [0, 1]
    assert made(scenario="domain_incremental").info.class_names == ("ant / cat", "bee / dog")


def test_splits_are_held_out_or_folders_of_their_own() -> None:
    stream = made(test=None, test_fraction=0.3, validation_fraction=0.2)
    for e in stream:
        assert e.validation is not None
        assert [d.labels.bincount()[list(e.classes)].tolist() for d in (e.train, e.validation, e.test)] == [
            [6, 6], [1, 1], [3, 3],
        ]  # fmt: skip
        parts = [seen(d) for d in (e.train, e.validation, e.test)]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    write("all/train", 4)
    write("all/test", 2)
    write("all/validation", 1)
    found = made(train="all", test=None)
    assert [[len(d) for d in (e.train, e.validation, e.test)] for e in found] == [[8, 2, 4]] * 2  # type: ignore[arg-type]
    write("held/train", 4)
    write("held/val", 1)
    held = made(train="held", test=None, test_fraction=0.5)
    assert held.info.class_names == CLASSES
    assert [[len(d) for d in (e.train, e.validation, e.test)] for e in held] == [[4, 2, 4]] * 2  # type: ignore[arg-type]
    assert [len(e.test) for e in made(train="held", test="test")] == [6, 6]
    assert refusal(train="all", test=None, test_fraction=0.5).startswith("stream.test_fraction holds samples out where")
    for place in ("odd/train", "odd/test"):  # classes of these names
        Path(place).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (4, 4)).save(f"{place}/{i}.png")
    assert made(train="odd", test=None, test_fraction=0.5, n_experiences=1).info.class_names == ("test", "train")


def test_sizes_and_channels() -> None:
    write("mixed", 2, size=(9, 9))
    Image.new("L", (5, 5), 200).save("mixed/ant/grey.png")
    assert "the images differ in size" in refusal(train="mixed")
    stream = made(train="mixed", image_size=8, channels=1)
    assert stream.info.input.shape == (1, 8, 8)
    Path("mixed/ant/list.csv").touch()
    assert made(train="mixed", image_size=8).notes == [
        "files of mixed that are no images by their names are left out: 1 (ant/list.csv)"
    ]
    assert 200 in stream[0].train.fetch(torch.arange(5))["pixel_values"]
    assert made(train="mixed", image_size=[2, 3]).info.input.shape == (3, 2, 3)
    assert refusal(image_size=[2]) == "stream.image_size=[2]: give pixels: one number, or [height, width]"


def test_what_is_not_there_is_refused() -> None:
    assert refusal(train="none") == "there is no folder none: one with a folder of images for each class is needed"
    Path("empty/ant").mkdir(parents=True)
    empty = " holds no images: a folder of image files is needed for each class"
    assert refusal(train="empty") == "empty" + empty
    Path("flat").mkdir()
    Image.fromarray(np.zeros((3, 3), np.uint8)).save("flat/1.png")
    assert refusal(train="flat") == "flat" + empty
    assert refusal(test=None).startswith("stream.test is missing: give a file, or stream.test_fraction=0.2")
    assert refusal(test_fraction=0.1).startswith("stream.test_fraction holds samples out where there is no stream.test")
    write("single", 1)
    assert refusal(train="single", test=None, test_fraction=0.5) == (
        "stream.test_fraction=0.5 of single leaves no sample to test on: give stream.test"
    )
    assert [len(e.test) for e in made(test=None, test_fraction=0.01)] == [2, 2]  # one of each class
    write("other", 1, ("ant", "emu"))
    assert refusal(test="other") == "other: the class 'emu' has no training images in train"
    write("two", 1, ("ant", "bee"))
    assert refusal(test="two") == "stream=mine: experience 2 has no test images"
    (Path("train/bee") / "x.png").write_text("no image")
    assert refusal().startswith("train/bee/x.png is not an image that can be read")
    assert "cannot be dealt evenly" in refusal(n_experiences=3)
