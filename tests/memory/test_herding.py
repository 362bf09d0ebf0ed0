"""Herding against the paper's formula tried on every sample, against Avalanche's, and what a buffer keeps of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exemplars import brute_force
from torch import Tensor

from clplatform.data import TensorData
from clplatform.memory.buffer import Buffer
from clplatform.memory.herding import add_herded, herding


def classes(sizes: tuple[int, ...] = (17, 9, 1, 24), dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of different lengths around a centre for each class, and labels (not 0, 1, …), shuffled."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.tensor([3, 5, 6, 11][: len(sizes)]).repeat_interleave(torch.tensor(sizes))
    features = torch.randn(12, dim, generator=g)[labels] + torch.randn(len(labels), dim, generator=g)
    features = features * (0.2 + 5 * torch.rand(len(labels), 1, generator=g))
    order = torch.randperm(len(labels), generator=g)
    return features[order], labels[order]


def chosen(place: Tensor, labels: Tensor, label: int) -> list[int]:
    """Positions within a class in the order in which they are chosen."""
    of_class = place[labels == label]
    order = torch.argsort(of_class)
    return order[of_class[order] < len(labels)].tolist()


@pytest.mark.parametrize("n", [1, 5, 100])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_formula_tried_on_every_sample(n: int, seed: int) -> None:
    features, labels = classes(seed=seed)
    place = herding(features, labels, n)
    for label in (3, 5, 6, 11):
        assert chosen(place, labels, label) == brute_force(features[labels == label], n)
    assert (place == len(labels)).sum() == sum(max(0, size - n) for size in (17, 9, 1, 24))


def test_features_without_normalisation_would_give_others() -> None:
    features, labels = classes()
    for label in (3, 5, 11):
        assert brute_force(features[labels == label], 5) != brute_force(features[labels == label], 5, normalise=False)


def test_a_feature_of_zeros_is_a_sample_like_the_others() -> None:
    features, labels = classes((12,))
    features[[2, 7]] = 0
    assert chosen(herding(features, labels, 12), labels, 3) == brute_force(features, 12)


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_agrees_with_avalanche_s_on_normalised_features() -> None:
    from avalanche.training.storage_policy import HerdingSelectionStrategy

    features, labels = classes((40,))
    normalised: Any = torch.nn.functional.normalize(features, dim=1)
    theirs = HerdingSelectionStrategy.make_sorted_indices_from_features(None, normalised)  # type: ignore[arg-type]
    assert chosen(herding(features, labels, 40), labels, 3) == theirs


def test_a_prefix_is_nearer_to_the_mean_than_random_samples() -> None:
    features, labels = classes((200,), dim=16)
    phi = torch.nn.functional.normalize(features, dim=1)
    first = phi[herding(features, labels, 10) < 10]
    draws = [phi[torch.randperm(200, generator=torch.Generator().manual_seed(s))[:10]] for s in range(200)]
    distances = [(x.mean(0) - phi.mean(0)).norm().item() for x in (first, *draws)]
    assert distances[0] < 0.5 * min(distances[1:])


def test_no_samples() -> None:
    assert herding(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 3).tolist() == []


# -- what a buffer keeps --------------------------------------------------------------------------------------------------


def data(labels: Tensor, start: int = 0) -> TensorData:
    index = torch.arange(start, start + len(labels))
    return TensorData({"labels": labels, "task_labels": torch.zeros_like(labels), "index": index, "x": index.float()})


def kept(buffer: Buffer) -> dict[int, set[int]]:
    """Indices that are stored, by class."""
    rows = buffer.take(torch.arange(len(buffer)))
    assert torch.equal(rows["x"], rows["index"].float())
    return {c: set(rows["index"][rows["labels"] == c].tolist()) for c in rows["labels"].unique().tolist()}


def test_equal_shares_are_prefixes_that_shrink_as_classes_come() -> None:
    buffer, g = Buffer(capacity=20, policy="class_balanced"), torch.Generator().manual_seed(0)
    order: dict[int, list[int]] = {}
    for part in range(4):
        features, labels = torch.randn(60, 5, generator=g), torch.arange(2 * part, 2 * part + 2).repeat(30)
        add_herded(buffer, data(labels, 60 * part), features, g)
        for label in (2 * part, 2 * part + 1):
            rows = (labels == label).nonzero()[:, 0]
            order[label] = [60 * part + int(rows[i]) for i in brute_force(features[rows], 20)]
        share, left = divmod(20, 2 * part + 2)
        sizes = {label: len(indices) for label, indices in kept(buffer).items()}
        assert sorted(sizes.values()) == [share] * (2 * part + 2 - left) + [share + 1] * left
        for label, indices in kept(buffer).items():
            assert indices == set(order[label][: sizes[label]])
    assert len(buffer) == 20


def test_a_small_class_leaves_its_room_to_the_others() -> None:
    features, labels = classes((17, 9, 1, 24))
    buffer = Buffer(capacity=20, policy="class_balanced")
    assert buffer.share(labels) == 7  # 6 + 6 + 1 + 6 are too few
    add_herded(buffer, data(labels), features, torch.Generator().manual_seed(0))
    assert sorted(len(x) for x in kept(buffer).values()) == [1, 6, 6, 7]


def test_all_is_kept_where_there_is_room() -> None:
    features, labels = classes((5, 4))
    buffer = Buffer(capacity=20, policy="class_balanced")
    assert buffer.share(labels) == 5
    add_herded(buffer, data(labels), features, torch.Generator().manual_seed(0))
    assert kept(buffer) == {c: set((labels == c).nonzero()[:, 0].tolist()) for c in (3, 5)}


def test_a_class_that_comes_in_parts_keeps_the_best_of_each() -> None:
    """As in a domain-incremental stream."""
    buffer, g = Buffer(capacity=6, policy="class_balanced"), torch.Generator().manual_seed(0)
    best = []
    for part in range(2):
        features, labels = torch.randn(20, 5, generator=g), torch.zeros(20, dtype=torch.int64)
        add_herded(buffer, data(labels, 20 * part), features, g)
        best += [20 * part + i for i in brute_force(features, 3)]
    assert kept(buffer) == {0: set(best)}


def test_a_class_that_comes_in_parts_has_no_larger_share() -> None:
    buffer, g = Buffer(capacity=12, policy="class_balanced"), torch.Generator().manual_seed(0)
    for part, label in enumerate((0, 0, 1)):
        labels = torch.full((20,), label)
        add_herded(buffer, data(labels, 20 * part), torch.randn(20, 5, generator=g), g)
    assert {label: len(indices) for label, indices in kept(buffer).items()} == {0: 6, 1: 6}


@pytest.mark.parametrize("capacity", [1, 7, 12, 19, 20, 1000])
def test_share_is_the_least_that_fills_the_memory(capacity: int) -> None:
    """Against filling one place of each class after the other."""
    stored, new = torch.tensor([0] * 3 + [1] * 2), torch.tensor([1] * 4 + [2] * 9)
    buffer = Buffer(capacity=1000)
    buffer.add({"labels": stored}, torch.Generator())
    buffer.capacity = capacity
    places, counts = [0, 0, 0], [3, 6, 9]
    for level in range(1, 10):
        for c in range(3):
            if sum(places) < capacity and counts[c] >= level:
                places[c] += 1
    assert buffer.share(new) == max(places)


def test_only_what_can_win_is_fetched() -> None:
    fetched = []

    class Watched(TensorData):
        def fetch(self, rows: Tensor) -> dict[str, Tensor]:
            fetched.append(len(rows))
            return super().fetch(rows)

    labels = torch.arange(2).repeat(500)
    watched = Watched(data(labels).columns)
    add_herded(Buffer(capacity=20, policy="class_balanced"), watched, torch.randn(1000, 4), torch.Generator())
    assert fetched == [20]
