"""The number of threads is a function of the model's size, the batch and the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from clplatform.threads import WORTH_A_THREAD, available, set_threads


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("factor", "threads"), [(0.9, 1), (1.1, 2)])
def test_a_second_thread_is_used_where_the_work_is_worth_it(factor: float, threads: int) -> None:
    module = nn.Linear(1000, 1000)  # a million multiply-adds for each position
    batch = round(factor * WORTH_A_THREAD / 4)
    assert set_threads(None, module, batch, 4) == torch.get_num_threads() == threads
    assert set_threads(None, module, batch * 4, 1) == threads


def test_tables_and_biases_are_no_work() -> None:
    """A row of an embedding is looked up, not multiplied."""
    module = nn.Sequential(nn.Embedding(100_000, 100), nn.LayerNorm(100), nn.Linear(100, 10))
    assert set_threads(None, module, 32, 16) == 1


@pytest.mark.parametrize(("asked", "threads"), [(1, 1), (2, 2), (64, 2)])
def test_a_number_is_taken_as_far_as_there_are_cores(asked: int, threads: int) -> None:
    assert set_threads(asked, nn.Linear(1, 1), 1, 1) == threads


@pytest.mark.parametrize(("value", "expected"), [("3", 3), (" 4,2", 4), ("", None), ("0", None), ("many", None)])
def test_what_the_environment_says(value: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert available() == (expected or cores)
