"""The memory: uniform where it says so, never over its limit, complete after a round trip."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy import stats

from clplatform.memory.buffer import Buffer, append, balanced, raw_rows


def stream(n: int, n_rare: int = 0) -> dict[str, torch.Tensor]:
    index = torch.arange(n)
    return {"labels": (index >= n - n_rare).long(), "index": index, "pixel_values": index[:, None].float()}


def fill(buffer: Buffer, rows: dict[str, torch.Tensor], seed: int, batch: int = 7) -> Buffer:
    g = torch.Generator().manual_seed(seed)
    for part in torch.arange(len(rows["labels"])).split(batch):
        buffer.add({k: v[part] for k, v in rows.items()}, g)
    return buffer


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_reservoir_is_uniform(batch: int) -> None:
    """Every sample is kept with probability capacity/n, whenever it came (chi-squared over positions)."""
    counts, trials, n, capacity = torch.zeros(60), 1500, 60, 10
    for seed in range(trials):
        counts[fill(Buffer(capacity=capacity), stream(n), seed, batch).rows["index"]] += 1
    expected = trials * capacity / n
    # Sampling without replacement: counts vary less than independent ones by the factor (1 − capacity/n).
    statistic = float(((counts - expected) ** 2 / (expected * (1 - capacity / n))).sum()) * (n - 1) / n
    assert 0.001 < stats.chi2.sf(statistic, n - 1) < 0.999


def test_a_reservoir_does_not_look_at_classes() -> None:
    """Of a rare class it holds what chance gives: the hypergeometric distribution's mean and variance."""
    trials, chance = 400, stats.hypergeom(100, 20, 20)
    rare = [
        int((fill(Buffer(capacity=20), stream(100, n_rare=20), seed).rows["index"] >= 80).sum())
        for seed in range(trials)
    ]
    found = torch.tensor(rare).double()
    assert abs(found.mean() - chance.mean()) < 4 * chance.std() / trials**0.5
    assert 0.75 < found.var() / chance.var() < 1.3


def test_class_balanced_shares_are_equal_and_uniform_within_a_class() -> None:
    counts, trials = torch.zeros(100), 800
    for seed in range(trials):
        kept = fill(Buffer(capacity=20, policy="class_balanced"), stream(100, n_rare=20), seed).rows["index"]
        assert (kept >= 80).sum() == 10
        counts[kept] += 1
    for part in (counts[:80], counts[80:]):
        expected = trials * 10 / len(part)
        statistic = (
            float(((part - expected) ** 2 / (expected * (1 - 10 / len(part)))).sum()) * (len(part) - 1) / len(part)
        )
        assert stats.chi2.sf(statistic, len(part) - 1) > 0.001


def test_class_balanced_leaves_no_place_empty() -> None:
    buffer = fill(Buffer(capacity=20, policy="class_balanced"), stream(100, n_rare=3), seed=0)
    assert len(buffer) == 20
    assert (buffer.labels == 1).sum() == 3


def test_score_of_class_balanced_is_rank_in_class_plus_key() -> None:
    keys, labels = torch.tensor([0.9, 0.1, 0.5, 0.3]).double(), torch.tensor([0, 0, 1, 0])
    assert torch.allclose(balanced(keys, labels), torch.tensor([2.9, 0.1, 0.5, 1.3]).double())


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_never_over_capacity_and_rows_stay_together(policy: str) -> None:
    buffer, g = Buffer(capacity=13, policy=policy), torch.Generator().manual_seed(0)  # type: ignore[arg-type]
    rows = stream(200, n_rare=50)
    for part in torch.randperm(200, generator=g).split(9):
        buffer.add({k: v[part] for k, v in rows.items()}, g)
        assert len(buffer) <= 13
        stored = buffer.take(torch.arange(len(buffer)))
        assert torch.equal(stored["pixel_values"][:, 0].long(), stored["index"])
        assert torch.equal(stored["labels"], (stored["index"] >= 150).long())
        assert len(stored["index"].unique()) == len(buffer)
    assert buffer.n_seen == 200


def test_round_trip_goes_on_the_same() -> None:
    rows = stream(100)
    a = fill(Buffer(capacity=10), rows, 0)
    b = Buffer(capacity=10)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    fill(a, rows, 1), fill(b, rows, 1)
    assert torch.equal(a.keys, b.keys)
    assert all(torch.equal(a.rows[k], b.rows[k]) for k in a.rows)
    assert a.n_seen == b.n_seen == 200


def test_sample_has_no_repetition_and_is_all_when_small() -> None:
    buffer = fill(Buffer(capacity=10), stream(100), 0)
    g = torch.Generator().manual_seed(0)
    assert len(buffer.sample(6, g)["index"].unique()) == 6
    assert sorted(buffer.sample(50, g)["index"].tolist()) == sorted(buffer.rows["index"].tolist())


def test_text_of_growing_length_is_padded() -> None:
    buffer, g = Buffer(capacity=4), torch.Generator().manual_seed(0)
    for length in (3, 5):
        ids = torch.full((2, length), length)
        buffer.add({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(2).long()}, g)
    stored = buffer.take(torch.arange(4))
    assert stored["input_ids"].shape == (4, 5)
    assert stored["attention_mask"].sum(1).tolist() == [3, 3, 5, 5]
    assert buffer.take(torch.tensor([0, 1]))["input_ids"].shape == (2, 3)


def test_raw_rows_come_before_augmentation_and_only_from_the_stream() -> None:
    batch = {
        "pixel_values": torch.tensor([10.0, 20.0, 30.0]),
        "raw_pixel_values": torch.tensor([1.0, 2.0, 3.0]),
        "labels": torch.tensor([0, 1, 2]),
        "source": torch.tensor([0, 1, 0]),
    }
    rows = raw_rows(batch)
    assert rows["pixel_values"].tolist() == [1.0, 3.0]
    assert set(rows) == {"pixel_values", "labels"}


def test_append_marks_the_source() -> None:
    batch = {"labels": torch.tensor([0]), "source": torch.tensor([0])}
    longer = append(batch, {"labels": torch.tensor([5, 6]), "logits": torch.zeros(2, 3)}, source=2)
    assert longer["source"].tolist() == [0, 2, 2]
    assert longer["labels"].tolist() == [0, 5, 6]
    assert "logits" not in longer


def test_cost_is_what_is_allocated() -> None:
    buffer = fill(Buffer(capacity=10), stream(100), 0)
    assert buffer.cost() == {"stored_samples": 10, "buffer_bytes": 10 * (8 + 8 + 4)}


def test_a_buffer_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        Buffer(capacity=0)
