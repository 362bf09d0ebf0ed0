"""Figures: what they draw, that they follow the page's colours, and that they can share one page."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from clplatform.metric.score import full_scale
from clplatform.report import figures, heatmap, loss_curve, svg
from clplatform.report.confusion import by_experience

MATRIX = [[None, None], [0.91, None], [0.42, 0.87]]


def texts(drawing: str) -> list[str]:
    return [t.strip() for t in re.findall(r"<text[^>]*>([^<]*)</text>", drawing)]


def test_the_heat_map_shows_percentages_and_leaves_null_cells_blank():
    shown = texts(heatmap.matrix_map(MATRIX, ["a", "b"], "accuracy"))
    assert {"91", "42", "87", "a", "b"} <= set(shown)
    assert sum(text.isdigit() and int(text) > 2 for text in shown) == 3


def test_a_perplexity_is_not_a_percentage():
    assert "12.5" in texts(heatmap.matrix_map([[None], [12.5]], ["a"], "perplexity"))


def test_figures_follow_the_page_and_ask_for_nothing():
    drawing = heatmap.matrix_map(MATRIX, ["<b>", "b"], "accuracy")
    assert "currentColor" in drawing
    assert svg.INK not in drawing
    assert "http" not in drawing
    assert "<style" not in drawing  # would apply to the whole page
    assert "&lt;b&gt;" in drawing
    ElementTree.fromstring(drawing)  # well formed


def test_ids_of_two_figures_differ_and_references_resolve():
    one = heatmap.matrix_map(MATRIX, ["a", "b"], "accuracy", "one")
    two = heatmap.matrix_map(MATRIX, ["a", "b"], "accuracy", "two")
    ids = [re.findall(r'\bid="([^"]+)"', drawing) for drawing in (one, two)]
    assert not set(ids[0]) & set(ids[1])
    assert len(ids[0]) == len(set(ids[0]))
    used = re.findall(r'(?:href="|url\()#([^")]+)', one)
    assert used
    assert set(used) <= set(ids[0])


def test_the_same_figure_is_the_same_bytes():
    assert heatmap.matrix_map(MATRIX, ["a", "b"], "accuracy") == heatmap.matrix_map(MATRIX, ["a", "b"], "accuracy")


@pytest.mark.parametrize("matrix", [[[None]], [[None], [0.5]], [[None] * 40] + [[0.5] * 40] * 40])
def test_matrices_of_any_size(matrix: list[list[float | None]]):
    names = [f"experience {i}" for i in range(len(matrix[0]))]
    assert heatmap.matrix_map(matrix, names, "accuracy").startswith("<svg")


def test_lines_with_gaps_and_a_single_point():
    drawing = figures.lines({"a": [0.9, None, 0.5], "b": [None, None, 0.8]}, 1, "accuracy", "y", "n", ordered=True)
    assert {"a", "b", "experiences learned"} <= set(texts(drawing))


def test_many_experiences_are_numbered():
    series = {f"a rather long name {i}": [0.5, 0.4] for i in range(12)}
    shown = texts(figures.lines(series, 1, "accuracy", "y", "n", ordered=True))
    assert "12" in shown
    assert not any("rather" in text for text in shown)


def test_names_that_look_the_same_when_short_become_numbers():
    names = [f"banking and cards {i}" for i in range(2)]
    assert not any("bank" in text for text in texts(heatmap.matrix_map(MATRIX, names, "accuracy")))
    assert heatmap.labels_of(names, [0, 1], 1) == ["1", "2"]
    assert heatmap.labels_of(["cards", "loans and more"], [0, 1], 1) == ["cards", "loans and m…"]


def test_the_better_a_cell_the_brighter_it_is():
    def brightness(drawing: str, number: str) -> float:
        """Of the cell that a number stands on: dark cells have white numbers."""
        label = drawing[: drawing.index(f">{number}<")].rpartition("<text")[2]
        return 0.0 if "#ffffff" in label else 1.0

    perplexities = [[None, None], [10.0, None], [90.0, 12.0]]
    lower = heatmap.matrix_map(perplexities, ["a", "b"], "perplexity", higher_is_better=False)
    assert brightness(lower, "10") > brightness(lower, "90")
    higher = heatmap.matrix_map([[None, None], [0.1, None], [0.9, 0.1]], ["a", "b"], "accuracy")
    assert brightness(higher, "90") > brightness(higher, "10")


def test_every_seed_is_a_line():
    seeds = {"a": [[0.9, 0.5], [0.8, 0.6], [0.7, 0.7]]}
    alone = figures.lines({"a": [0.8, 0.6]}, 1, "accuracy", "y", "n")
    drawing = figures.lines({"a": [0.8, 0.6]}, 1, "accuracy", "y", "n", samples=seeds)
    assert drawing.count("stroke-opacity: 0.45") == 3
    assert "stroke-opacity: 0.45" not in alone


def test_more_than_ten_groups_can_be_told_apart():
    drawing = figures.lines({f"group {i}": [0.5, 0.4] for i in range(12)}, 1, "accuracy", "y", "n", wide=True)
    looks = re.findall(r'style="fill: none;( stroke-dasharray: [^;]*;)?[^"]*stroke: (#[0-9a-f]{6})', drawing)
    assert len({look for look in looks if look[1] in svg.SERIES}) == 12


def rows(n: int) -> list[dict[str, object]]:
    return [{"step": i, "experience": 1 + 2 * i // n, "train/loss": 2.0 + i, "train/ewc": 1.0} for i in range(n)]


def test_a_step_logged_twice_counts_as_logged_last():
    log = [*rows(4), {"step": 3, "experience": 2, "train/loss": 9.0}]
    assert loss_curve.loss_terms(log)["train/loss"] == {0: 2.0, 1: 3.0, 2: 4.0, 3: 9.0}
    assert loss_curve.boundaries(log) == [2]


def test_loss_terms_leave_out_what_is_no_loss():
    log = [{"step": 1, "train/loss": 1.0, "train/task": 1.0, "train/lr": 0.1, "validation/accuracy": 0.5}]
    assert list(loss_curve.loss_terms(log)) == ["train/loss"]  # task and sum are the same
    assert loss_curve.loss_terms([{"step": 1, "train/loss": None}, {"train/loss": 1.0}]) == {}
    assert loss_curve.losses([{"step": 1}]) is None
    assert "ewc" in texts(loss_curve.losses(rows(10)) or "")


def test_long_curves_are_thinned_to_means():
    n = 10 * loss_curve.MOST_POINTS + 3
    steps, values = loss_curve.thin(np.arange(n)[::-1], np.arange(n, dtype=float)[::-1])
    assert len(steps) <= loss_curve.MOST_POINTS
    assert np.all(np.diff(steps) > 0)
    assert values == pytest.approx(steps)
    assert values[0] == np.arange(11).mean()


def test_time_bars_and_phases():
    timing = [{"evaluate": 1.0, "train": 2.0}, {"train": 3.0, "consolidate": 0.5}]
    assert figures.phases(timing) == ["train", "consolidate", "evaluate"]
    assert {"train", "consolidate", "evaluate"} <= set(texts(figures.time_bars(timing)))


def test_scores_of_texts_have_a_scale_of_their_own():
    """Nobody gets 100 % BLEU: the scale ends at the next ten. Accuracies have the same scale in every report."""
    assert [full_scale("bleu", best) for best in (0.0, 26.5, 30.0, math.nan)] == [10, 30, 30, 100]
    assert full_scale("accuracy", 26.5) == full_scale("exact_match", 26.5) == 100
    rows = [[0.177, None], [0.11, 0.265]]
    low, high = (heatmap.matrix_map(rows, ["de", "fr"], metric) for metric in ("accuracy", "bleu"))
    assert texts(low) == texts(high) and low != high  # the same numbers in other colours
    lines = {"a": [0.177, 0.265]}
    assert "100" in texts(figures.lines(lines, 1, "accuracy", "score", "x"))
    assert {"0", "30"} <= set(shown := texts(figures.lines(lines, 1, "bleu", "score", "x"))) and "40" not in shown


def test_confusion_rows_are_shares_of_their_class():
    counts = np.array([[3, 1, 0], [0, 5, 0], [0, 0, 0]])
    shown = texts(heatmap.confusion_map(counts, ["cat", "dog", "owl"], [1]))
    assert {"75", "25", "100", "cat", "owl"} <= set(shown)


def test_confusions_are_summed_by_experience():
    counts = np.arange(25).reshape(5, 5)
    sizes = [2, 1, 2]
    expected = [
        [counts[a : a + m, b : b + n].sum() for b, n in zip([0, 2, 3], sizes, strict=True)]
        for a, m in zip([0, 2, 3], sizes, strict=True)
    ]
    assert by_experience(counts, sizes).tolist() == expected


def relative_luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("page", ["#ffffff", "#14181e"])
def test_lines_can_be_seen_on_light_and_dark_pages(page: str):
    ground = relative_luminance(page)
    for color in [*svg.SERIES, *svg.sequence(15)]:
        low, high = sorted([relative_luminance(color), ground])
        assert (high + 0.05) / (low + 0.05) >= 2.6, color


def test_numbers_in_cells_contrast_with_them():
    assert svg.contrast((1.0, 1.0, 0.2)) == "#000000"
    assert svg.contrast((0.2, 0.0, 0.3)) == "#ffffff"
