"""Where image data sets come from: embedded, local files in their published format, or a download.

A loader takes `data_dir` (None: `$CLPLATFORM_DATA/<name>`, else the download cache) and returns the training and the
test set as (images uint8 [N, C, H, W], labels int64 [N]) and the names of the classes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clplatform.data import derive_seed
from clplatform.stream.tables import unzipped
from clplatform.types import ClplatformError

Labelled = tuple[Tensor, Tensor]
Loaded = tuple[Labelled, Labelled, Sequence[str]]

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def digits(data_dir: str | None = None) -> Loaded:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels (0 … 16, here 0 … 255), embedded in that package.
    A fixed quarter of each class is the test set."""
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    x = torch.from_numpy(images).view(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(derive_seed("digits", "test")))
    test = torch.zeros(len(y), dtype=torch.bool)
    for c in range(10):
        rows = order[y[order] == c]
        test[rows[: len(rows) // 4]] = True
    return (x[~test], y[~test]), (x[test], y[test]), [str(c) for c in range(10)]


def mnist(data_dir: str | None = None) -> Loaded:
    """MNIST from its four IDX files."""
    return _idx("mnist", data_dir, [str(c) for c in range(10)])


def fashion_mnist(data_dir: str | None = None) -> Loaded:
    """Fashion-MNIST from its four IDX files."""
    return _idx("fashion_mnist", data_dir, FASHION)


def _idx(name: str, data_dir: str | None, class_names: Sequence[str]) -> Loaded:
    folder = data_folder(name, data_dir)
    if folder is None:
        return _torchvision(name, class_names)
    parts = []
    for prefix in ("train", "t10k"):
        images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte"))
        labels = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte", f"{prefix}-labels.idx1-ubyte"))
        if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
            raise ClplatformError(
                f"{folder}: {prefix} has images {list(images.shape)} and labels {list(labels.shape)}; "
                "[N, height, width] and [N] are needed"
            )
        if parts and images.shape[1:] != parts[0][0].shape[2:]:
            raise ClplatformError(
                f"{folder}: {prefix} has images of {list(images.shape[1:])} pixels, train of {list(parts[0][0].shape[2:])}"
            )
        if labels.max() >= len(class_names):
            raise ClplatformError(
                f"{folder}: {prefix} has the label {labels.max()}; {name} has {len(class_names)} classes"
            )
        parts.append((torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    return parts[0], parts[1], class_names


def _find(folder: Path, *names: str) -> Path:
    candidates = [base / (name + end) for base in (folder, folder / "raw") for name in names for end in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise ClplatformError(f"{folder} lacks {names[0]} (or {names[0]}.gz): put the four IDX files of the data set there")


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, compressed or not.

    Format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each as a big-endian 32-bit
    integer, then the values.

    Raises:
        ClplatformError: it is something else, or cut off.
    """
    content = unzipped(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ClplatformError(f"{path} is not an IDX file of unsigned bytes")
    n = content[3]
    shape = struct.unpack(f">{n}I", content[4 : 4 + 4 * n]) if len(content) >= 4 + 4 * n else ()
    values = np.frombuffer(content, np.uint8, offset=min(len(content), 4 + 4 * n))
    if len(shape) != n or values.size != np.prod(shape):
        raise ClplatformError(f"{path} is cut off or too long: {values.size} values for the shape {list(shape)}")
    return values.reshape(shape).copy()


def data_folder(name: str, data_dir: str | None) -> Path | None:
    """The folder of a data set: `data_dir`, or `$CLPLATFORM_DATA/<name>` if it is there, or None.

    Raises:
        ClplatformError: `data_dir` or `$CLPLATFORM_DATA` is given and is not there.
    """
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise ClplatformError(f"stream.data_dir={data_dir}: there is no such folder")
        return folder / name if (folder / name).is_dir() else folder
    root = os.environ.get("CLPLATFORM_DATA")
    if not root:
        return None
    if not Path(root).expanduser().is_dir():
        raise ClplatformError(f"CLPLATFORM_DATA={root}: there is no such folder")
    folder = Path(root).expanduser() / name
    return folder if folder.is_dir() else None


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "clplatform"


def missing(name: str, files: str, error: object = None) -> ClplatformError:
    """What to say when a data set is neither here nor to be had."""
    why = f" and the download failed ({type(error).__name__})" if error is not None else ""
    return ClplatformError(
        f"the data set {name} is not here{why}: put {files} into a folder and give stream.data_dir=<folder>, "
        f"or into $CLPLATFORM_DATA/{name}"
    )


def _torchvision(name: str, class_names: Sequence[str] | None = None) -> Loaded:
    """Download through torchvision (a failing network gives up after seconds, not minutes)."""
    import socket

    from torchvision import datasets

    kinds = {
        "mnist": (datasets.MNIST, "the four IDX files"),
        "fashion_mnist": (datasets.FashionMNIST, "the four IDX files"),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    }
    kind, files = kinds[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        train, test = (kind(str(cache_folder()), train=flag, download=True) for flag in (True, False))
    except Exception as error:
        raise missing(name, files, error) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return _tensors(train), _tensors(test), class_names or train.classes


def _tensors(data: object) -> Labelled:
    x = torch.as_tensor(data.data)  # type: ignore[attr-defined]
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.as_tensor(data.targets).long()  # type: ignore[attr-defined]


def _cifar(name: str, data_dir: str | None) -> Loaded:
    """CIFAR from its published folder of batches, read by torchvision (which checks their checksums)."""
    from torchvision import datasets

    folder = data_folder(name, data_dir)
    if folder is None:
        return _torchvision(name)
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root = folder.parent if folder.name == kind.base_folder else folder
    try:
        train, test = (kind(str(root), train=flag) for flag in (True, False))
    except RuntimeError:  # torchvision does not say which: a file is missing, or its checksum is another
        raise ClplatformError(
            f"{folder}: the folder {kind.base_folder} of the published archive is not there, or damaged; put it there"
        ) from None
    return _tensors(train), _tensors(test), train.classes


def cifar10(data_dir: str | None = None) -> Loaded:
    """CIFAR-10."""
    return _cifar("cifar10", data_dir)


def cifar100(data_dir: str | None = None) -> Loaded:
    """CIFAR-100."""
    return _cifar("cifar100", data_dir)


def tiny_imagenet(data_dir: str | None = None) -> Loaded:
    """Tiny ImageNet from its published folder (`train/<class>/images`, `val/images`, `val/val_annotations.txt`)."""
    folder = data_folder("tiny_imagenet", data_dir)
    if folder is not None and (folder / "tiny-imagenet-200").is_dir():
        folder /= "tiny-imagenet-200"
    if folder is None or not (folder / "wnids.txt").is_file():
        raise missing("tiny_imagenet", "the unpacked tiny-imagenet-200 (with wnids.txt in it)")
    names = (folder / "wnids.txt").read_text().split()
    train = [(p, i) for i, n in enumerate(names) for p in sorted((folder / "train" / n / "images").glob("*.JPEG"))]
    lacking = sorted(set(names) - {p.parent.parent.name for p, _ in train})
    if lacking:
        raise ClplatformError(
            f"{folder / 'train'} has no images of {', '.join(lacking[:3])}: unpack tiny-imagenet-200 again"
        )
    return _decode(train), _decode(_annotations(folder / "val", names)), names


def _annotations(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """Files and classes of Tiny ImageNet's validation images, whose labels are public (those of its test are not)."""
    path = folder / "val_annotations.txt"
    if not path.is_file():
        raise ClplatformError(f"there is no file {path}: unpack tiny-imagenet-200 again")
    number = {name: i for i, name in enumerate(names)}
    items = []
    for line, row in enumerate(path.read_text().splitlines(), start=1):
        file, _, rest = row.partition("\t")
        label = rest.partition("\t")[0]
        if label not in number:
            raise ClplatformError(f"{path}:{line}: the class {label!r} is not in wnids.txt")
        items.append((folder / "images" / file, number[label]))
    return items


def _decode(items: Sequence[tuple[Path, int]]) -> Labelled:
    """RGB images of 64×64 pixels."""
    from PIL import Image

    images = torch.empty(len(items), 3, 64, 64, dtype=torch.uint8)
    for i, (path, _) in enumerate(items):
        try:
            with Image.open(path) as file:
                image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        except OSError as error:  # Pillow's UnidentifiedImageError among them
            raise ClplatformError(f"{path} cannot be read ({error}): unpack tiny-imagenet-200 again") from None
        if image.shape != images.shape[1:]:
            raise ClplatformError(f"{path} has {list(image.shape[1:])} pixels; [64, 64] are needed")
        images[i] = image
    return images, torch.tensor([label for _, label in items])


LOADERS: dict[str, Callable[[str | None], Loaded]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
}
