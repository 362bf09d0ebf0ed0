"""Dealing classes to experiences, numbering them, and holding validation samples out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clplatform.stream.base import (
    InMemoryStream,
    make_experiences,
    number_classes,
    plan_classes,
    resolve_order,
    split_validation,
    task_label,
)
from clplatform.stream.images import split_images
from clplatform.types import ClplatformError

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]


def plan(
    n: int = 3, *, scenario: str = "class_incremental", seed: int | None = None, class_order: list[int] | None = None
):
    return plan_classes(NAMES, n, scenario=scenario, seed=seed, class_order=class_order, what="animals")  # type: ignore[arg-type]


def test_classes_come_in_their_natural_order_without_a_seed() -> None:
    assert plan().groups == [[0, 1], [2, 3], [4, 5]]
    assert plan().class_names == tuple(NAMES)


def test_a_seed_shuffles_the_classes_and_nothing_else_does() -> None:
    orders = []
    for global_seed in range(3):
        torch.manual_seed(global_seed)
        orders.append([c for group in plan(seed=1).groups for c in group])
    assert orders[0] == orders[1] == orders[2] != list(range(6))
    assert sorted(orders[0]) == list(range(6))
    assert len({tuple(resolve_order(6, seed, None, "")) for seed in range(8)}) > 5


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
def test_classes_are_numbered_in_the_order_of_appearance(scenario: str) -> None:
    given = plan(scenario=scenario, class_order=[5, 3, 0, 1, 4, 2], seed=7)  # an order given beats the seed
    assert given.groups == [[5, 3], [0, 1], [4, 2]]
    assert given.number_of.tolist() == [2, 3, 5, 1, 4, 0]
    assert given.class_names == ("fox", "dog", "ant", "bee", "elk", "cat")


def test_domains_number_a_class_by_its_place_within_the_experience() -> None:
    given = plan(scenario="domain_incremental", class_order=[5, 3, 0, 1, 4, 2])
    assert given.number_of.tolist() == [0, 1, 1, 1, 0, 0]
    assert given.class_names == ("fox / ant / elk", "dog / bee / cat")


def test_an_order_may_leave_classes_out() -> None:
    given = plan(2, class_order=[4, 1])
    assert given.groups == [[4], [1]]
    assert given.number_of.tolist() == [-1, 1, -1, -1, 0, -1]


@pytest.mark.parametrize("n", [-1, 0, 4, 7, 12])
def test_a_number_of_experiences_that_does_not_divide_the_classes(n: int) -> None:
    with pytest.raises(
        ClplatformError, match=rf"n_experiences={n}: the 6 classes of animals .* possible are 1, 2, 3, 6"
    ):
        plan(n)


@pytest.mark.parametrize(
    ("order", "wrong"),
    [([0, 1, 6], r"\[6\]"), ([0, -1], r"\[-1\]"), ([2, 2, 1], r"\[2\]"), ([], "at most once, 0 … 5")],
)
def test_a_wrong_class_order_is_quoted(order: list[int], wrong: str) -> None:
    with pytest.raises(ClplatformError, match=rf"class_order=.* of animals .*{wrong}"):
        plan(1, class_order=order)


def test_domains_of_different_size_are_refused() -> None:
    with pytest.raises(ClplatformError, match=r"as many classes in every experience; they have \[2, 1\]"):
        number_classes([[0, 1], [2]], NAMES, "domain_incremental")


def test_a_class_cannot_have_two_places_in_two_domains() -> None:
    with pytest.raises(ClplatformError, match="more than one experience has bee"):
        number_classes([[0, 1], [1, 2]], NAMES, "domain_incremental")


def test_a_class_of_two_experiences_keeps_its_number() -> None:
    assert number_classes([[1, 0], [0, 2]], NAMES, "class_incremental").number_of.tolist() == [1, 0, 2, -1, -1, -1]


# --- validation


def test_validation_takes_the_same_share_of_every_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 20)[torch.randperm(70)]
    kept, held_out = split_validation(labels, 0.2, seed=0)
    assert labels[held_out].bincount().tolist() == [8, 2, 4]
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(70))


def test_every_class_keeps_a_training_sample() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    kept, _ = split_validation(labels, 0.99, seed=0)
    assert labels[kept].tolist() == [0, 1, 2]


def test_the_validation_split_depends_on_its_seed_only() -> None:
    labels = torch.arange(100) % 5
    splits = []
    for global_seed in range(2):
        torch.manual_seed(global_seed)
        splits.append(split_validation(labels, 0.3, seed=4)[1])
    assert torch.equal(*splits)
    assert not torch.equal(splits[0], split_validation(labels, 0.3, seed=5)[1])


# --- experiences


def test_only_task_incremental_streams_have_task_ids() -> None:
    assert [task_label(s, 3) for s in ("class_incremental", "domain_incremental", "task_incremental")] == [0, 0, 3]


def test_an_experience_knows_how_many_classes_were_seen() -> None:
    part = {"train": object(), "validation": None, "test": object()}
    experiences = make_experiences([part] * 3, [(0, 1), (0, 1), (2, 3, 4)], "task_incremental")  # type: ignore[list-item]
    assert [e.n_seen_classes for e in experiences] == [2, 2, 5]
    assert [e.task_label for e in experiences] == [0, 1, 2]
    assert experiences[2].info.name == "experience 3"


def test_a_stream_is_a_sequence_whose_augmentation_may_be_missing(tmp_path: Path) -> None:
    stream = split_images(
        name="s", dataset="digits", scenario="class_incremental", n_experiences=2, class_order=None, seed=None, data_dir=None,
        validation_fraction=0, augment="none",
    )  # fmt: skip
    assert isinstance(stream, InMemoryStream) and len(stream) == 2
    assert [e.index for e in stream] == [0, 1] and stream[1] is stream.experiences[1]
    batch = stream[0].train.fetch(torch.arange(3))  # type: ignore[attr-defined]
    assert not stream.augments and stream.augment(batch, torch.Generator()) is batch
    stream.save_assets(tmp_path / "assets")
    assert not (tmp_path / "assets").exists()  # images need nothing beside the weights
