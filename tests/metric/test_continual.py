"""min-ACC and WC-ACC by hand."""

from __future__ import annotations

import random

import pytest

from clplatform.metric.continual import in_order, measures


def row(experience: int, step: int, *scores: float | None, end: bool = False) -> dict:
    return {"experience": experience, "step": step, "end": end, "scores": list(scores)}


ROWS = [
    row(0, 5, 0.1), row(0, 10, 0.9), row(0, 10, 0.8, end=True),
    row(1, 15, 0.3, 0.5), row(1, 20, 0.6, 0.7), row(1, 20, 0.7, 0.9, end=True),
    row(2, 25, 0.5, 0.2, 0.1), row(2, 30, 0.4, 0.6, 0.9, end=True),
]  # fmt: skip


def test_by_hand() -> None:
    found = measures(ROWS)
    assert found["worst"] == [0.3, 0.2]  # not 0.1: that was while it was learned
    assert found["min_acc"] == pytest.approx(0.25)
    assert found["wc_acc"] == pytest.approx(0.9 / 3 + 2 / 3 * 0.25)


def test_where_lower_is_better_the_worst_is_the_highest() -> None:
    found = measures(ROWS, higher_is_better=False)
    assert found["worst"] == [0.7, 0.6]
    assert found["wc_acc"] == pytest.approx(0.9 / 3 + 2 / 3 * 0.65)


def test_an_experience_that_has_begun_does_not_count_yet() -> None:
    assert measures(ROWS[:7]) == measures(ROWS[:6])
    assert measures(ROWS[:6])["worst"] == [0.3]


@pytest.mark.parametrize("rows", [[], ROWS[:2], ROWS[:3]])
def test_nothing_to_measure_yet(rows: list) -> None:
    assert measures(rows) == {"worst": [], "min_acc": None, "wc_acc": None}


def test_values_without_meaning_do_not_count() -> None:
    found = measures([*ROWS[:3], row(1, 15, None, 0.5), row(1, 20, 0.7, 0.9, end=True)])
    assert found["worst"] == [0.7]
    assert measures([*ROWS[:3], row(1, 20, None, 0.9, end=True)])["worst"] == [None]


def test_what_was_evaluated_twice_counts_as_last() -> None:
    again = row(1, 15, 0.31, 0.5)
    assert in_order([*ROWS, again]) == [*ROWS[:3], again, *ROWS[4:]]
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert in_order(shuffled) == ROWS
