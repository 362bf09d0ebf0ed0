"""A share of every class is kept apart, however much of the class the memory keeps."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from clplatform.data import TensorData
from clplatform.memory.buffer import Buffer
from clplatform.memory.held_out import draw_held_out, n_held_out, ranked


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("share", ["0.07", "0.1", "0.25", "0.3", "0.5", "0.9"])
def test_how_many_is_the_exact_share_rounded_up(share: str) -> None:
    for n in range(400):
        assert n_held_out(n, float(share)) == math.ceil(Fraction(share) * n)


def test_a_draw_is_of_each_class_and_random() -> None:
    labels = torch.tensor([3] * 30 + [5] * 9 + [6]).roll(7)
    seen = set()
    for seed in range(50):
        held = draw_held_out(labels, 6, generator(seed))
        assert torch.bincount(labels[held], minlength=7).tolist() == [0, 0, 0, 6, 0, 4, 0]  # of 9 and of 1 half
        assert torch.equal(held, held.unique())
        seen |= set(held.tolist())
    assert len(seen) == 39
    assert draw_held_out(labels[:0], 6, generator()).tolist() == []


@pytest.mark.parametrize("share", [0.07, 0.1, 0.3, 0.5, 0.9])
def test_every_prefix_of_a_class_holds_out_its_share(share: float) -> None:
    labels = torch.arange(3).repeat(40)
    held = torch.zeros(120, dtype=torch.bool)
    held[draw_held_out(labels, 36, generator())] = True
    n_kept = int((held & (labels == 0)).sum())
    rank = ranked(labels, held, share, generator())
    for c in range(3):
        of_class = labels == c
        assert sorted(rank[of_class].tolist()) == list(range(40))
        in_order = held[of_class][torch.argsort(rank[of_class])]
        for n in range(1, 41):
            possible = min(n_held_out(n, share), n_kept)
            assert int(in_order[:n].sum()) == max(possible, n - (40 - n_kept)), (c, n)


def test_which_comes_first_is_random_in_both_kinds() -> None:
    labels, held = torch.zeros(40, dtype=torch.int64), torch.arange(40) < 4
    firsts = [torch.argsort(ranked(labels, held, 0.1, generator(seed)))[:2].tolist() for seed in range(200)]
    assert {kept for kept, _ in firsts} == {0, 1, 2, 3}
    assert len({other for _, other in firsts}) == 36


def test_a_shrinking_memory_keeps_the_share_of_every_class() -> None:
    buffer, g = Buffer(capacity=60, policy="class_balanced"), generator()
    for part in range(6):
        labels = torch.tensor([part]).repeat(80)
        index = torch.arange(80 * part, 80 * part + 80)
        data = TensorData({"labels": labels, "task_labels": 0 * labels, "index": index})
        held = torch.zeros(80, dtype=torch.bool)
        held[draw_held_out(labels, n_held_out(60 // (part + 1), 0.1), g)] = True
        buffer.add_ranked(data, ranked(labels, held, 0.1, g), g, held_out=held)
        rows = buffer.take(torch.arange(60))
        for c in range(part + 1):
            n = int((rows["labels"] == c).sum())
            assert n in (60 // (part + 1), 60 // (part + 1) + 1)
            assert int(rows["held_out"][rows["labels"] == c].sum()) == n_held_out(60 // (part + 1), 0.1)
