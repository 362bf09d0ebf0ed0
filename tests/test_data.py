"""Columns, their concatenation and the order in which they are loaded."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from torch import Tensor

from clplatform.data import ConcatData, Loader, TensorData, concat, derive_seed, trim


def numbers(n: int = 6, start: int = 0) -> TensorData:
    """`x` is the sample id times ten."""
    index = torch.arange(start, start + n)
    return TensorData({"x": index * 10, "labels": index % 3, "task_labels": torch.zeros_like(index), "index": index})


def text(lengths: list[int], width: int) -> TensorData:
    """Texts of so many tokens, all of them ones, stored with `width` columns."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    n = torch.arange(len(lengths))
    columns = {"input_ids": mask.clone(), "attention_mask": mask, "labels": n, "task_labels": n * 0, "index": n}
    return TensorData(columns)


def seen(loader: Loader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


# --- TensorData


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="'labels': 3"):
        TensorData({"labels": torch.zeros(3), "task_labels": torch.zeros(3), "index": torch.zeros(2)})


def test_columns_that_every_batch_has_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"lack \['index', 'task_labels'\]"):
        TensorData({"labels": torch.zeros(3)})


def test_fetch_gives_the_asked_rows_in_order_from_source_0() -> None:
    batch = numbers().fetch(torch.tensor([4, 0, 4]))
    assert batch["x"].tolist() == [40, 0, 40]
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["source"].tolist() == [0, 0, 0]


def test_a_selection_of_a_selection_shares_memory() -> None:
    data = numbers()
    part = data.select(torch.tensor([5, 3, 1])).select(torch.tensor([2, 0]))
    assert part.labels.tolist() == [1, 2] and len(part) == 2
    assert part.fetch(torch.tensor([0, 1]))["x"].tolist() == [10, 50]
    assert all(part.columns[name] is data.columns[name] for name in data.columns)


def test_a_transform_works_on_whole_batches_and_survives_selection() -> None:
    data = numbers()
    doubled = TensorData(data.columns, transform=lambda batch: {**batch, "x": batch["x"] * 2})
    assert doubled.select(torch.tensor([3])).fetch(torch.tensor([0]))["x"].tolist() == [60]
    assert doubled.column("x").tolist() == data.column("x").tolist()  # a column is untransformed


def test_one_sample_has_no_batch_dimension() -> None:
    sample = numbers()[2]
    assert sample["x"].shape == () and sample["x"] == 20


# --- text


def test_text_is_cut_to_the_longest_of_the_batch() -> None:
    data = text([1, 4, 2], width=9)
    assert data.fetch(torch.tensor([0, 2]))["input_ids"].tolist() == [[1, 0], [1, 1]]
    assert data.fetch(torch.tensor([1]))["attention_mask"].shape == (1, 4)


def test_trim_leaves_other_columns_alone() -> None:
    batch = {**text([1, 2], width=3).fetch(torch.tensor([0, 1])), "logits": torch.rand(2, 3)}
    batch["attention_mask"] = torch.tensor([[1, 0, 0], [1, 0, 0]])
    batch["input_ids"] = torch.ones(2, 3)
    trimmed = trim(batch)
    assert trimmed["input_ids"].shape == (2, 1)
    assert trimmed["logits"].shape == (2, 3)


def test_texts_are_padded_to_the_longest_when_concatenated() -> None:
    a, b = ({"input_ids": torch.ones(1, n), "labels": torch.full((1, n), 5)} for n in (1, 3))
    joined = concat([a, b])
    assert joined["input_ids"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert joined["labels"].tolist() == [[5, -100, -100], [5, 5, 5]]  # −100: no loss is taken there


def test_only_shared_columns_are_concatenated() -> None:
    a, b = {"x": torch.ones(2), "logits": torch.ones(2)}, {"x": torch.zeros(1)}
    assert {name: value.tolist() for name, value in concat([a, b]).items()} == {"x": [1, 1, 0]}


# --- ConcatData


def test_concatenated_data_is_fetched_in_the_order_asked_for() -> None:
    data = numbers(3) + numbers(2, start=3) + numbers(4, start=5)
    assert isinstance(data, ConcatData) and len(data.parts) == 3 and len(data) == 9
    rows = torch.tensor([8, 0, 4, 3, 8, 2, 5])
    assert data.fetch(rows)["index"].tolist() == rows.tolist()
    assert data.fetch(rows)["x"].tolist() == (rows * 10).tolist()
    assert data.labels.tolist() == [i % 3 for i in range(9)]


def test_concatenated_text_of_different_width() -> None:
    batch = (text([2], width=2) + text([5, 3], width=7)).fetch(torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_selection_of_a_concatenation_keeps_the_order_of_its_rows() -> None:
    data = (numbers(3) + numbers(3, start=3)).select(torch.tensor([5, 0, 3, 1])).select(torch.tensor([2, 0, 1]))
    assert data.fetch(torch.arange(3))["index"].tolist() == [3, 5, 0]
    assert data.labels.tolist() == [0, 2, 0]
    assert (data + numbers(1, start=9)).fetch(torch.tensor([3, 0]))["index"].tolist() == [9, 3]


# --- Loader


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    make = lambda seed: Loader(numbers(50), 7, shuffle=True, seed=seed)  # noqa: E731
    a, b = make(3), make(3)
    torch.manual_seed(99)  # the global generator has no say
    first = seen(a)
    torch.rand(5)
    assert first == seen(b)
    assert first != seen(a)  # the second epoch
    assert first != seen(make(4))
    assert sorted(itertools.chain(*first)) == list(range(50))
    assert torch.equal(a.order(7), b.order(7))


def test_loading_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    seen(Loader(numbers(), 2, shuffle=True))
    assert torch.equal(state, torch.get_rng_state())


def test_without_shuffling_the_order_is_the_data_s() -> None:
    assert seen(Loader(numbers(5), 2)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("n", "drop_last", "sizes"), [(5, True, [2, 2]), (4, True, [2, 2]), (1, True, []), (0, False, [])]
)
def test_length_and_drop_last(n: int, drop_last: bool, sizes: list[int]) -> None:
    loader = Loader(numbers(n), 2, shuffle=True, drop_last=drop_last)
    assert [len(batch) for batch in seen(loader)] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("done", [0, 1, 3, 4, 6])
def test_a_state_taken_anywhere_goes_on_with_the_next_batch(done: int) -> None:
    make = lambda: Loader(numbers(7), 2, shuffle=True, seed=1)  # noqa: E731  4 batches an epoch
    whole = make()
    expected = seen(whole) + seen(whole)
    stopped, taken = make(), []
    while len(taken) < done:
        for batch in stopped:
            taken.append(batch["index"].tolist())
            if len(taken) == done:
                break
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    rest = seen(resumed)
    while len(taken) + len(rest) < len(expected):
        rest += seen(resumed)
    assert taken + rest == expected


def test_after_a_pass_that_was_broken_off_the_next_epoch_is_whole() -> None:
    loader = Loader(numbers(6), 2, shuffle=True)
    next(iter(loader))
    order = loader.order(1)
    assert seen(loader) == [rows.tolist() for rows in order.split(2)]


def test_workers_fetch_the_same_batches() -> None:
    here, there = (Loader(numbers(5), 2, shuffle=True, seed=2, num_workers=n) for n in (0, 1))
    assert seen(here) == seen(there)


# --- derive_seed


def test_a_derived_seed_is_the_same_for_ever() -> None:
    expected = int(hashlib.blake2b(b"7/epoch/0", digest_size=8).hexdigest(), 16) // 2
    assert derive_seed(7, "epoch", 0) == expected


def test_derived_seeds_differ_and_are_accepted_by_torch() -> None:
    seeds = {
        derive_seed(seed, what, epoch) for seed in range(10) for what in ("epoch", "class order") for epoch in range(10)
    }
    assert len(seeds) == 200
    assert all(0 <= s < 2**63 for s in seeds)
    draws: list[Tensor] = [torch.rand(4, generator=torch.Generator().manual_seed(s)) for s in sorted(seeds)[-2:]]
    assert not torch.equal(*draws)
