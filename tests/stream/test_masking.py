"""Masked language modelling: how much is hidden, by what, and that evaluation always hides the same."""

from __future__ import annotations

import pytest
import torch

from clplatform.stream.masking import Masking
from clplatform.types import IGNORED, Batch

V, SPECIAL, MASK = 50, [0, 1, 2, 3, 4], 4


def masking() -> Masking:
    table = torch.zeros(V, dtype=torch.bool)
    table[SPECIAL] = True
    return Masking(table, MASK)


def texts(n: int, length: int, seed: int = 0) -> Batch:
    """1 … 2 and padding 0, of 3 … `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (n, 1), generator=generator)
    lengths[0] = length
    place = torch.arange(length)
    ids = torch.randint(5, V, (n, length), generator=generator)
    ids = ids.where(place > 0, 1).where(place < lengths - 1, 2).where(place < lengths, 0)
    return {"original_ids": ids, "attention_mask": (place < lengths).long(), "index": torch.arange(n)}


def parts(batch: Batch, masked: Batch) -> dict[str, float]:
    """Of the chosen tokens: those behind the mask, changed, and as they were."""
    chosen = masked["labels"] != IGNORED
    ids, original = masked["input_ids"][chosen], batch["original_ids"][chosen]
    n = len(ids)
    return {
        "mask": float((ids == MASK).sum()) / n,
        "other": float(((ids != MASK) & (ids != original)).sum()) / n,
        "same": float((ids == original).sum()) / n,
    }


@pytest.mark.parametrize("fixed", [True, False])
def test_fifteen_percent_are_chosen_and_80_10_10_hidden(fixed: bool) -> None:
    batch, m = texts(3000, 64), masking()
    masked = (
        m.fixed(batch["original_ids"], batch["attention_mask"], batch["index"])
        if fixed
        else m(batch, torch.Generator().manual_seed(3))
    )
    original, chosen = batch["original_ids"], masked["labels"] != IGNORED
    free = (original >= 5).sum(1)
    assert torch.equal(chosen.sum(1), (0.15 * free).round().long().clamp(min=1))
    assert torch.equal(masked["labels"][chosen], original[chosen])
    assert torch.equal(masked["input_ids"][~chosen], original[~chosen])  # so special tokens and padding too
    assert not (chosen & (original < 5)).any()
    assert ((masked["input_ids"] >= 5) | (masked["input_ids"] == MASK))[chosen].all()
    found = parts(batch, masked)  # about 13,000 tokens: a standard deviation of 0.0035
    assert abs(found["mask"] - 0.8) < 0.015 and abs(found["same"] - 0.1) < 0.015 and abs(found["other"] - 0.1) < 0.015
    where = chosen[free == 62].float().mean(0)[1:-1]  # no place is chosen more often
    assert where.min() > 0.02 and where.max() < 0.5


def test_random_tokens_are_of_the_whole_vocabulary() -> None:
    batch = texts(3000, 64)
    masked = masking()(batch, torch.Generator().manual_seed(0))
    changed = (masked["input_ids"] != MASK) & (masked["input_ids"] != batch["original_ids"])
    counts = masked["input_ids"][changed].bincount(minlength=V)
    assert (counts[:5] == 0).all() and (counts[5:] > 5).all()


def test_the_mask_of_evaluation_is_a_function_of_the_sample_s_id() -> None:
    batch, m = texts(40, 20), masking()
    ids, attention, index = batch["original_ids"], batch["attention_mask"], batch["index"]
    whole = m.fixed(ids, attention, index)
    some = torch.tensor([31, 2, 17])
    part = m.fixed(ids[some], attention[some], index[some])
    assert all(torch.equal(whole[name][some], part[name]) for name in whole)
    padded = m.fixed(torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(attention, (0, 5)), index)
    assert torch.equal(padded["labels"][:, :20], whole["labels"])
    same = ids[:1].expand(30, -1), attention[:1].expand(30, -1)  # one text by many ids
    assert len({tuple(row) for row in m.fixed(*same, torch.arange(30))["labels"].tolist()}) > 20


def test_training_hides_others_each_time_and_follows_its_generator() -> None:
    batch, m = texts(8, 30), masking()
    draws = [m(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0]["labels"], draws[1]["labels"])
    assert not torch.equal(draws[0]["labels"], draws[2]["labels"])
    assert draws[0].keys() == {*batch, "input_ids", "labels"}
    others = {"input_ids": torch.ones(2, 3)}
    assert m(others, torch.Generator()) is others


def test_a_text_of_special_tokens_has_nothing_to_predict() -> None:
    ids = torch.tensor([[1, 2, 0], [1, 7, 2]])
    masked = masking().fixed(ids, (ids > 0).long(), torch.arange(2))
    assert (masked["labels"][0] == IGNORED).all() and masked["labels"][1].tolist() == [IGNORED, 7, IGNORED]
