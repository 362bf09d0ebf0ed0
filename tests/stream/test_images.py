"""Image streams: who sees which samples under which label, the transforms, and images for prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from clplatform.stream.base import InMemoryStream
from clplatform.stream.image_files import digits
from clplatform.stream.images import images_to_tensor, split_images, transformed_images
from clplatform.types import ClplatformError, Data, InputSpec

SCENARIOS = ["class_incremental", "task_incremental", "domain_incremental"]


def split(**options: Any) -> InMemoryStream:
    given = {
        "name": "split_digits", "dataset": "digits", "scenario": "class_incremental", "n_experiences": 5, "class_order": None,
        "seed": None, "data_dir": None, "validation_fraction": 0.1, "augment": "none",
    }  # fmt: skip
    return split_images(**given | options)


def transformed(**options: Any) -> InMemoryStream:
    given = {
        "name": "permuted_digits", "dataset": "digits", "transform": "permutation", "scenario": "domain_incremental",
        "n_experiences": 3, "max_angle": 180.0, "seed": None, "data_dir": None, "validation_fraction": 0.1, "augment": "none",
    }  # fmt: skip
    return transformed_images(**given | options)


def ids(data: Data | None) -> set[int]:
    assert data is not None
    return set(data.fetch(torch.arange(len(data)))["index"].tolist())


def everything(data: Data | None) -> dict[str, Tensor]:
    assert data is not None
    return data.fetch(torch.arange(len(data)))


# --- split by classes


def test_splits_never_overlap_and_lose_no_sample() -> None:
    stream = split()
    train, validation, test = (
        [ids(getattr(e, part)) for e in stream] for part in ("train", "validation", "test")
    )  # fmt: skip
    groups = [*train, *validation, *test]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 1797
    assert [len(v) for v in validation] == pytest.approx(
        [0.1 * (len(t) + len(v)) for t, v in zip(train, validation, strict=True)], abs=1
    )


def test_an_index_names_the_same_sample_whatever_the_order_of_classes() -> None:
    images = torch.cat([x for x, _ in digits()[:2]])
    for e in split(seed=3):
        for part in (e.train, e.validation, e.test):
            batch = everything(part)
            assert torch.equal(batch["pixel_values"], images[batch["index"]])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_labels_classes_and_task_labels(scenario: str) -> None:
    order = [7, 3, 0, 1, 9, 8, 2, 4, 6, 5]
    originals = torch.cat([y for _, y in digits()[:2]])
    stream = split(scenario=scenario, class_order=order)
    for i, e in enumerate(stream):
        own = order[2 * i : 2 * i + 2]
        numbers = (0, 1) if scenario == "domain_incremental" else (2 * i, 2 * i + 1)
        task = i if scenario == "task_incremental" else 0
        assert (e.classes, e.task_label, e.name) == (numbers, task, f"{own[0]} {own[1]}")
        assert e.n_seen_classes == (2 if scenario == "domain_incremental" else 2 * i + 2)
        for part in (e.train, e.validation, e.test):
            batch = everything(part)
            expected = [numbers[own.index(c)] for c in originals[batch["index"]].tolist()]
            assert batch["labels"].tolist() == expected
            assert set(expected) == set(numbers)
            assert set(batch["task_labels"].tolist()) == {task}
    assert stream.info.task_ids == (scenario == "task_incremental")
    assert stream.info.class_names[0] == ("7 / 0 / 9 / 2 / 6" if scenario == "domain_incremental" else "7")


def test_the_seed_fixes_class_order_and_validation_and_the_global_generator_has_no_say() -> None:
    torch.manual_seed(1)
    a = split(seed=0)
    torch.manual_seed(2)
    b, other = split(seed=0), split(seed=1)
    assert a.info.class_names == b.info.class_names != other.info.class_names
    assert [ids(e.validation) for e in a] == [ids(e.validation) for e in b]
    same_order = [int(name) for name in a.info.class_names]
    assert ids(a[0].validation) != ids(split(seed=1, class_order=same_order)[0].validation)


def test_validation_is_stratified() -> None:
    for e in split(validation_fraction=0.2):
        assert e.validation is not None
        counts = [d.labels.bincount(minlength=10).float() for d in (e.train, e.validation)]
        share = counts[1] / (counts[0] + counts[1])
        assert share[list(e.classes)].tolist() == pytest.approx([0.2] * 2, abs=0.005)


def test_the_test_split_is_the_same_whatever_is_held_out() -> None:
    a, b = split(), split(validation_fraction=0)
    assert all(ids(x.test) == ids(y.test) for x, y in zip(a, b, strict=True))
    assert all(e.validation is None for e in b)


def test_the_input_specification_is_of_the_training_pixels() -> None:
    spec = split().info.input
    x = digits()[0][0].numpy() / 255
    assert spec.shape == (1, 8, 8)
    assert spec.mean == pytest.approx([x.mean()], abs=1e-5)
    assert spec.std == pytest.approx([x.std(ddof=1)], abs=1e-5)


def test_all_experiences_share_the_pixels() -> None:
    pixels = {e.train.columns["pixel_values"].data_ptr() for e in split()}  # type: ignore[attr-defined]
    assert len(pixels) == 1


@pytest.mark.parametrize(
    ("n", "message"), [(0, "at least one"), (3, "cannot be dealt evenly"), (20, "possible are 1, 2, 5, 10")]
)
def test_wrong_numbers_of_experiences(n: int, message: str) -> None:
    with pytest.raises(ClplatformError, match=rf"stream.n_experiences={n}: .*{message}"):
        split(n_experiences=n)


# --- permuted and rotated


def test_the_first_experience_is_untouched_and_all_show_the_same_samples_and_labels() -> None:
    stream = transformed()
    x, y = digits()[1]
    for i, e in enumerate(stream):
        batch = everything(e.test)
        assert torch.equal(batch["pixel_values"], x) == (i == 0)
        assert torch.equal(batch["labels"], y)
        assert e.classes == tuple(range(10)) and e.n_seen_classes == 10
    assert [e.name for e in stream] == ["original", "permutation 1", "permutation 2"]


def test_held_out_samples_are_never_trained_on_in_any_experience() -> None:
    stream = transformed()
    trained = set.union(*(ids(e.train) for e in stream))
    assert all(not trained & (ids(e.validation) | ids(e.test)) for e in stream)


def test_a_permutation_moves_the_pixels_of_all_images_in_one_way() -> None:
    x = digits()[1][0].flatten(1)
    moved = [everything(e.test)["pixel_values"].flatten(1) for e in transformed(seed=1)]
    for y in moved[1:]:
        # Each place shows, over all images, what exactly one place of the originals shows (dark corners aside).
        columns, places = ([c.numpy().tobytes() for c in t.T] for t in (x, y))
        assert sorted(columns) == sorted(places)
        assert columns != places
    assert not torch.equal(moved[1], moved[2])


def test_permutations_depend_on_the_seed_only() -> None:
    def pixels(seed: int | None) -> Tensor:
        torch.rand(1)
        return everything(transformed(seed=seed)[1].train)["pixel_values"]

    assert torch.equal(pixels(0), pixels(0))
    assert not torch.equal(pixels(0)[0], pixels(1)[0])


def test_rotations_grow_evenly_and_agree_with_torchvision() -> None:
    stream = transformed(transform="rotation", n_experiences=4, max_angle=90.0)
    x = digits()[1][0]
    assert [e.name for e in stream] == ["original", "30°", "60°", "90°"]
    for angle, e in zip([0, 30, 60, 90], stream, strict=True):
        turned = everything(e.test)["pixel_values"]
        reference = TF.rotate(x.float(), angle, TF.InterpolationMode.BILINEAR).round()
        assert turned.dtype == torch.uint8
        assert (turned.float() - reference).abs().max() <= 1
    assert torch.equal(everything(stream[3].test)["pixel_values"], x.rot90(dims=(2, 3)))


def test_a_single_rotated_experience_is_the_original() -> None:
    assert [e.name for e in transformed(transform="rotation", n_experiences=1)] == ["original"]


def test_task_incremental_permutations_have_task_labels() -> None:
    stream = transformed(scenario="task_incremental")
    assert [set(everything(e.train)["task_labels"].tolist()) for e in stream] == [{0}, {1}, {2}]
    assert stream.info.task_ids


# --- images for prediction

GREY, COLOUR = InputSpec("image", shape=(1, 4, 6)), InputSpec("image", shape=(3, 4, 6))


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("spec", [GREY, COLOUR])
def test_a_file_and_the_array_of_its_pixels_are_the_same_image(
    spec: InputSpec, rgb: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(rgb).save(tmp_path / "image.png")
    from_file = images_to_tensor(str(tmp_path / "image.png"), spec)
    from_array = images_to_tensor(rgb.transpose(2, 0, 1)[None], spec)
    assert from_file.shape == (1, *spec.shape) and from_file.dtype == torch.uint8  # type: ignore[misc]
    assert (from_file.int() - from_array.int()).abs().max() <= (spec is GREY)  # PIL rounds grey down


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32])
def test_arrays_of_any_type_hold_the_same_pixels(dtype: Any) -> None:
    pixels = np.arange(48).reshape(2, 4, 6) * 5
    given = (pixels / 255 if dtype == np.float32 else pixels).astype(dtype)
    assert images_to_tensor(given, GREY)[:, 0].tolist() == pixels.tolist()
    assert images_to_tensor(
        torch.from_numpy(given.astype(np.float32) / (1 if dtype == np.float32 else 255)), COLOUR
    ).shape == (2, 3, 4, 6)


def test_other_sizes_are_resized() -> None:
    x = images_to_tensor(np.full((2, 9, 9), 77, dtype=np.uint8), GREY)
    assert x.shape == (2, 1, 4, 6)
    assert x.unique().tolist() == [77]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 6)), r"not \[4, 6\]"),
        (np.full((1, 4, 6), 300), "reach from 300 to 300"),
        (np.full((1, 4, 6), -1), "lie in 0 … 255"),
        (np.full((1, 4, 6), 1.5), "floats lie in 0 … 1; these reach from 1.5"),
        (np.full((1, 4, 6), np.nan), "nan"),
        (np.zeros((1, 4, 4, 6), np.uint8), "have 4 channels, the model expects 1"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, message: str) -> None:
    with pytest.raises(ClplatformError, match=message):
        images_to_tensor(array, GREY)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ClplatformError, match=r"text\.png is not an image"):
        images_to_tensor([tmp_path / "text.png"], GREY)
    with pytest.raises(ClplatformError, match=r"there is no file .*nowhere\.png"):
        images_to_tensor("nowhere.png", GREY)
