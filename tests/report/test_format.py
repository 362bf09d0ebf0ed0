"""Numbers as people read them."""

from __future__ import annotations

import pytest

from clplatform.report.format import count, difference, metric_value, score, seconds, shorten, size, spread


def test_accuracies_are_percentages_and_others_are_not():
    assert score(0.6834) == "68.3 %"
    assert score(0.6834, unit=False) == "68.3"
    assert score(12.3456, "perplexity") == "12.35"
    assert score(None) == "–"


def test_differences_have_a_sign_and_their_unit():
    assert difference(0.25) == "+25.0 pp"
    assert difference(-0.25) == "−25.0 pp"
    assert difference(-0.0001) == "0.0 pp"  # no minus zero
    assert difference(-3.0, "perplexity") == "−3"
    assert metric_value("average_forgetting", 0.1) == "+10.0 pp"
    assert metric_value("average_accuracy", 0.1) == "10.0 %"


def test_spread_is_the_sample_standard_deviation():
    assert spread([0.5, 0.7], "average_accuracy", "accuracy") == "60.0 ± 14.1"  # √0.02, and not √0.01
    assert spread([0.5], "average_accuracy", "accuracy") == "50.0"
    assert spread([], "average_accuracy", "accuracy") == "–"
    assert spread([-0.1, -0.3], "backward_transfer", "accuracy") == "−20.0 ± 14.1"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.44, "0.4 s"), (12.4, "12 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (None, "–")],
)
def test_seconds(value: float | None, text: str):
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (734_003_200, "700.0 MiB"), (2**41, "2.0 TiB"), (None, "–")]
)
def test_sizes(value: float | None, text: str):
    assert size(value) == text


def test_counts_and_words():
    assert count(1797) == "1,797"
    assert count(None) == "–"
    assert count("x") == "x"
    assert shorten("a long name", 6) == "a lon…"
