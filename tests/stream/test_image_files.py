"""Image data sets in their published formats: what is read, and what is said when they are damaged or missing."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from clplatform.stream.image_files import (
    FASHION,
    cifar10,
    cifar100,
    data_folder,
    digits,
    fashion_mnist,
    mnist,
    read_idx,
    tiny_imagenet,
)
from clplatform.stream.images import split_images
from clplatform.types import ClplatformError

REAL = Path(os.environ.get("CLPLATFORM_DATA", "nowhere")).resolve() / "fashion_mnist"
real = pytest.mark.skipif(not REAL.is_dir(), reason="CLPLATFORM_DATA names no folder with fashion_mnist")
NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CLPLATFORM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def idx(array: np.ndarray) -> bytes:
    """The array in the format of http://yann.lecun.com/exdb/mnist."""
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def four_arrays(seed: int = 0, n: int = 30, size: int = 28) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    arrays = {}
    for prefix, m in (("train", n), ("t10k", n // 2)):
        arrays[f"{prefix}-images-idx3-ubyte"] = draw.integers(0, 256, (m, size, size), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = draw.integers(0, 10, m, dtype=np.uint8)
    return arrays


def write(folder: Path, arrays: dict[str, np.ndarray], *, end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = idx(array)
        (folder / (name + end)).write_bytes(gzip.compress(content) if end else content)
    return folder


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        call(*arguments)
    return str(caught.value)


# --- digits


def test_digits_are_scikit_learn_s_with_a_fixed_quarter_of_each_class_for_the_test() -> None:
    (x, y), (test_x, test_y), names = digits()
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    assert x.dtype == torch.uint8 and x.shape[1:] == (1, 8, 8) and names == [str(c) for c in range(10)]
    ours = torch.cat([torch.cat([x, test_x]).flatten(1).long(), torch.cat([y, test_y])[:, None]], dim=1).tolist()
    assert sorted(ours) == sorted(np.column_stack([np.rint(images * 255 / 16), labels]).astype(int).tolist())
    assert test_y.bincount().tolist() == [n // 4 for n in np.bincount(labels)]
    torch.manual_seed(1)
    assert torch.equal(digits()[1][0], test_x)


# --- IDX


@pytest.mark.parametrize("shape", [(7,), (3, 4), (5, 2, 3), (2, 2, 2, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_file_of_any_shape(shape: tuple[int, ...], packed: bool) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Path("a").write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    read = read_idx(Path("a"))
    assert np.array_equal(read, array) and read.dtype == np.uint8
    read[0] = 0  # its own memory, which torch may write to


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


ARRAY = np.arange(240, dtype=np.uint8).reshape(10, 4, 6)
PACKED = gzip.compress(idx(ARRAY), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file of unsigned bytes"),
        (b"<html>not found</html>", "is not an IDX file of unsigned bytes"),
        (idx(ARRAY).replace(b"\x08", b"\x0d", 1), "is not an IDX file of unsigned bytes"),  # floats
        (idx(ARRAY)[:9], "is cut off or too long: 0 values for the shape []"),
        (idx(ARRAY)[:-1], "is cut off or too long: 239 values for the shape [10, 4, 6]"),
        (idx(ARRAY) + b"x", "is cut off or too long: 241 values for the shape [10, 4, 6]"),
        (PACKED[:1], "is not an IDX file of unsigned bytes"),
        (PACKED[:7], "is damaged ("),
        (PACKED[:-20], "is damaged ("),
        (PACKED[:-3], "is damaged ("),
        (flipped(PACKED, len(PACKED) // 2), "is damaged ("),
        (flipped(PACKED, len(PACKED) - 6), "is damaged ("),  # the checksum
        (PACKED + b"garbage", "is damaged ("),
    ],
)
def test_a_damaged_idx_file_is_named(content: bytes, message: str) -> None:
    Path("a.gz").write_bytes(content)
    assert refusal(read_idx, Path("a.gz")).startswith(f"a.gz {message}")


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "raw", "mnist", "mnist/raw"])
def test_the_four_files_where_people_have_them(end: str, inside: str, tmp_path: Path) -> None:
    arrays = four_arrays()
    write(tmp_path / "data" / inside, arrays, end=end)
    train, test, names = mnist(str(tmp_path / "data"))
    for (x, y), prefix in ((train, "train"), (test, "t10k")):
        assert np.array_equal(x[:, 0], arrays[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(y, arrays[f"{prefix}-labels-idx1-ubyte"]) and y.dtype == torch.int64
    assert list(names) == [str(c) for c in range(10)]


def test_the_other_spelling_of_the_names(tmp_path: Path) -> None:
    arrays = {name.replace("-idx", ".idx"): array for name, array in four_arrays().items()}
    write(tmp_path / "data", arrays)
    assert np.array_equal(mnist(str(tmp_path / "data"))[1][0][:, 0], arrays["t10k-images.idx3-ubyte"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train-images-idx3-ubyte": np.zeros((29, 28, 28), np.uint8)},
         "train has images [29, 28, 28] and labels [30]; [N, height, width] and [N] are needed"),
        ({"t10k-images-idx3-ubyte": np.zeros((15, 784), np.uint8)}, "t10k has images [15, 784] and labels [15];"),
        ({"train-images-idx3-ubyte": np.zeros((0, 28, 28), np.uint8), "train-labels-idx1-ubyte": np.zeros(0, np.uint8)},
         "train has images [0, 28, 28] and labels [0];"),
        ({"t10k-images-idx3-ubyte": np.zeros((15, 32, 32), np.uint8)},
         "t10k has images of [32, 32] pixels, train of [28, 28]"),
        ({"t10k-labels-idx1-ubyte": np.full(15, 10, np.uint8)},
         "t10k has the label 10; fashion_mnist has 10 classes"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_together(change: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", four_arrays() | change)
    assert refusal(fashion_mnist, str(folder)).startswith(f"{folder}: {message}")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_damaged_one_of_the_four_is_named(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", four_arrays(), end=".gz")
    (folder / f"{name}.gz").write_bytes((folder / f"{name}.gz").read_bytes()[:-2])
    assert refusal(mnist, str(folder)).startswith(f"{folder / name}.gz is damaged (")
    (folder / f"{name}.gz").unlink()
    assert (
        refusal(mnist, str(folder))
        == f"{folder} lacks {name} (or {name}.gz): put the four IDX files of the data set there"
    )


# --- where data is looked for


def test_the_folder_given_comes_before_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    everywhere = write(tmp_path / "everywhere" / "mnist", four_arrays(1)).parent
    own = write(tmp_path / "own", four_arrays(2))
    assert data_folder("mnist", None) is None
    monkeypatch.setenv("CLPLATFORM_DATA", str(everywhere))
    assert data_folder("mnist", None) == everywhere / "mnist"
    assert data_folder("mnist", str(everywhere)) == everywhere / "mnist"
    assert data_folder("mnist", str(own)) == own
    assert data_folder("cifar10", None) is None
    assert np.array_equal(mnist(str(own))[0][0][:, 0], four_arrays(2)["train-images-idx3-ubyte"])
    assert np.array_equal(mnist(None)[0][0][:, 0], four_arrays(1)["train-images-idx3-ubyte"])


def test_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(mnist, "nowhere") == "stream.data_dir=nowhere: there is no such folder"
    monkeypatch.setenv("CLPLATFORM_DATA", "gone")
    assert refusal(mnist, None) == "CLPLATFORM_DATA=gone: there is no such folder"


def test_what_was_downloaded_before_is_read_from_the_cache(tmp_path: Path) -> None:
    """Through torchvision, which finds its four files; so this compares our reading with torchvision's, too."""
    arrays = four_arrays()
    folder = write(tmp_path / "cache" / "clplatform" / "FashionMNIST" / "raw", arrays)
    by_torchvision, by_us = fashion_mnist(None), fashion_mnist(str(folder))
    for (x, y), (own_x, own_y) in zip(by_torchvision[:2], by_us[:2], strict=True):
        assert torch.equal(x, own_x) and torch.equal(y, own_y)
    assert by_torchvision[2] == by_us[2] == FASHION


def test_a_download_that_fails_says_what_to_get(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        assert socket.getdefaulttimeout() == 10
        raise OSError("no route")

    monkeypatch.setattr(datasets, "MNIST", fail)
    assert refusal(mnist, None) == (
        "the data set mnist is not here and the download failed (OSError): put the four IDX files into a folder and give "
        "stream.data_dir=<folder>, or into $CLPLATFORM_DATA/mnist"
    )
    assert socket.getdefaulttimeout() is None


# --- CIFAR


@pytest.mark.parametrize(("load", "kind", "k"), [(cifar10, datasets.CIFAR10, 10), (cifar100, datasets.CIFAR100, 100)])
@pytest.mark.parametrize("named", [False, True])
def test_cifar_s_published_batches(
    load: Any, kind: Any, k: int, named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Small batches of the published form; their checksums are not the published ones."""
    draw = np.random.default_rng(0)
    root = tmp_path / "data"
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    labels_key = "labels" if k == 10 else "fine_labels"
    names = [f"class {c}" for c in range(k)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    expected: dict[str, tuple[Any, Any]] = {}
    for attribute in ("train_list", "test_list"):
        batches = []
        for file, _ in getattr(kind, attribute):
            data, labels = draw.integers(0, 256, (6, 3072), dtype=np.uint8), draw.integers(0, k, 6).tolist()
            (folder / file).write_bytes(pickle.dumps({"data": data, labels_key: labels}))
            batches.append((data, labels))
        expected[attribute] = np.concatenate([d for d, _ in batches]), [c for _, y in batches for c in y]
        monkeypatch.setattr(kind, attribute, [[file, None] for file, _ in getattr(kind, attribute)])
    train, test, class_names = load(str(folder if named else root))
    assert class_names == names
    for (x, y), attribute in ((train, "train_list"), (test, "test_list")):
        data, labels = expected[attribute]
        assert np.array_equal(x, data.reshape(-1, 3, 32, 32)) and x.is_contiguous()
        assert y.tolist() == labels


def test_a_cifar_archive_that_is_missing_or_damaged(tmp_path: Path) -> None:
    message = "the folder cifar-10-batches-py of the published archive is not there, or damaged; put it there"
    assert refusal(cifar10, str(tmp_path)) == f"{tmp_path}: {message}"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file, _ in [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]:
        (folder / file).write_bytes(b"not what was published")
    assert refusal(cifar10, str(folder)) == f"{folder}: {message}"


# --- Tiny ImageNet


def picture(path: Path, seed: int, size: int = 64, *, grey: bool = False) -> np.ndarray:
    """Write a smooth JPEG, which changes little by its compression; returns what it shows, [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4) if grey else (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
    image.save(path, "JPEG", quality=100, subsampling=0)
    return np.asarray(image.convert("RGB"))


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Three classes of two training images and one for validation, one of them grey, as some of the published are; and
    what they show, in this order, [9, H, W, 3]."""
    folder = tmp_path / "data" / "tiny-imagenet-200"
    names = ["n03", "n01", "n02"]
    shown = [
        picture(folder / "train" / name / "images" / f"{name}_{j}.JPEG", seed=10 * i + j, grey=i == j == 1)
        for i, name in enumerate(names)
        for j in range(2)
    ]
    shown += [picture(folder / "val" / "images" / f"val_{i}.JPEG", seed=100 + i) for i in range(3)]
    lines = [f"val_{i}.JPEG\t{names[i - 1]}\t0\t0\t62\t62\n" for i in range(3)]
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder, np.stack(shown)


@pytest.mark.parametrize("inside", [True, False])
def test_tiny_imagenet_s_published_folder(tiny: tuple[Path, np.ndarray], inside: bool) -> None:
    folder, shown = tiny
    (x, y), (test_x, test_y), names = tiny_imagenet(str(folder if inside else folder.parent))
    assert list(names) == ["n03", "n01", "n02"]
    assert y.tolist() == [0, 0, 1, 1, 2, 2] and test_y.tolist() == [2, 0, 1]
    read = torch.cat([x, test_x]).permute(0, 2, 3, 1).numpy()
    assert read.dtype == np.uint8 and read.shape == shown.shape
    assert np.abs(read.astype(int) - shown).max() <= 4


def test_tiny_imagenet_damaged(tiny: tuple[Path, np.ndarray]) -> None:
    folder = tiny[0]
    annotations, image = folder / "val" / "val_annotations.txt", folder / "train" / "n01" / "images" / "n01_0.JPEG"
    good = annotations.read_text()
    for wrong in ("val_1.JPEG\tn77\t0\t0\t62\t62", "val_1.JPEG"):
        annotations.write_text(good.replace("val_1.JPEG\tn03\t0\t0\t62\t62", wrong))
        label = wrong[11:14]
        assert refusal(tiny_imagenet, str(folder)) == f"{annotations}:2: the class {label!r} is not in wnids.txt"
    annotations.unlink()
    assert refusal(tiny_imagenet, str(folder)).startswith(f"there is no file {annotations}")
    annotations.write_text(good)
    image.write_bytes(b"no image")
    assert refusal(tiny_imagenet, str(folder)).startswith(f"{image} cannot be read (cannot identify image file")
    picture(image, 0, size=32)
    assert refusal(tiny_imagenet, str(folder)) == f"{image} has [32, 32] pixels; [64, 64] are needed"
    for file in image.parent.iterdir():
        file.unlink()
    assert refusal(tiny_imagenet, str(folder)).startswith(f"{folder / 'train'} has no images of n01: unpack")
    (folder / "wnids.txt").unlink()
    assert refusal(tiny_imagenet, str(folder)).startswith("the data set tiny_imagenet is not here: put the unpacked")


# --- the real Fashion-MNIST


@real
def test_fashion_mnist_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPLATFORM_DATA", str(REAL.parent))
    (x, y), (test_x, test_y), names = fashion_mnist(None)
    assert x.shape == (60_000, 1, 28, 28) and test_x.shape == (10_000, 1, 28, 28) and names == FASHION
    assert y.bincount().tolist() == [6_000] * 10 and test_y.bincount().tolist() == [1_000] * 10
    pixels = x.double() / 255
    # The numbers that everybody normalises with, e.g. https://github.com/zalandoresearch/fashion-mnist/issues/97
    assert pixels.mean().item() == pytest.approx(0.2860, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3530, abs=1e-4)
    assert y[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # of the published files


@real
def test_split_fashion_mnist_uses_every_image_once() -> None:
    stream = split_images(
        name="split_fashion_mnist", dataset="fashion_mnist", scenario="class_incremental", n_experiences=5, class_order=None,
        seed=0, data_dir=str(REAL), validation_fraction=0.1, augment="none",
    )  # fmt: skip
    used = []
    for e in stream:
        sizes = []
        for part in (e.train, e.validation, e.test):
            assert part is not None
            batch = part.fetch(torch.arange(len(part)))
            assert set(batch["labels"].tolist()) == set(e.classes)
            used.append(batch["index"])
            sizes.append(len(part))
        assert sizes == [10_800, 1_200, 2_000]
    assert torch.equal(torch.cat(used).sort().values, torch.arange(70_000))
    assert stream.info.input.mean == pytest.approx((0.286,), abs=0.005)
