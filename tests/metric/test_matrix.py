"""The metrics against numbers worked out by hand, a naive loop, Avalanche, and the mistakes others made."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from clplatform.metric.matrix import (
    METRICS,
    average_accuracy,
    average_anytime_accuracy,
    average_forgetting,
    backward_transfer,
    forgetting_per_experience,
    forgetting_ratio,
    forward_transfer,
    intransigence,
    learning_accuracy,
    summarize,
    worst_accuracy,
)

# Class-incremental: nothing is known of an experience before its classes exist.
CLASSES = [[None] * 3, [0.9, None, None], [0.6, 0.8, None], [0.7, 0.5, 0.95]]
# Domain-incremental: every cell has a meaning. The last row is the best that experience 2 ever was.
DOMAINS = [[0.2, 0.1, 0.3], [0.9, 0.4, 0.35], [0.5, 0.7, 0.45], [0.6, 0.8, 0.9]]


def test_by_hand_class_incremental():
    found = summarize(CLASSES)
    assert found["average_accuracy"] == pytest.approx((0.7 + 0.5 + 0.95) / 3)
    assert found["average_anytime_accuracy"] == pytest.approx((0.9 + 0.7 + 2.15 / 3) / 3)
    assert found["average_forgetting"] == pytest.approx((0.2 + 0.3) / 2)
    assert found["backward_transfer"] == pytest.approx((-0.2 - 0.3) / 2)
    assert found["forward_transfer"] is None  # undefined, and not zero
    assert found["learning_accuracy"] == pytest.approx((0.9 + 0.8 + 0.95) / 3)
    assert found["intransigence"] is None
    assert found["worst_accuracy"] == pytest.approx((0.6 + 0.5) / 2)


def test_by_hand_domain_incremental():
    found = summarize(DOMAINS)
    # Experience 2 ended better than ever before: negative forgetting, which a maximum over the final row would hide.
    assert found["average_forgetting"] == pytest.approx((0.3 + (0.7 - 0.8)) / 2)
    assert found["backward_transfer"] == pytest.approx((-0.3 + 0.1) / 2)
    assert found["forward_transfer"] == pytest.approx(((0.4 - 0.1) + (0.45 - 0.3)) / 2)
    assert found["worst_accuracy"] == pytest.approx((0.5 + 0.8) / 2)


def test_forgetting_counts_values_from_before_an_experience_was_learned():
    # Chaudhry's maximum runs over all earlier experiences, but row 0 is no experience.
    matrix = [[0.99, 0.99], [0.5, 0.8], [0.4, 0.6]]
    assert average_forgetting(matrix) == pytest.approx(0.1)
    three = [[0.0] * 3, [0.5, 0.9, 0.1], [0.4, 0.6, 0.1], [0.4, 0.5, 0.3]]
    assert average_forgetting(three) == pytest.approx(((0.5 - 0.4) + (0.9 - 0.5)) / 2)


def test_forgetting_can_be_negative_on_average():
    assert average_forgetting([[0.1, 0.1], [0.5, 0.1], [0.9, 0.9]]) == pytest.approx(-0.4)


def test_forgetting_is_averaged_over_one_experience_less_than_there_are():
    # T − 1, not T: the last experience cannot have been forgotten.
    assert average_forgetting([[None, None], [1.0, None], [0.0, 1.0]]) == 1.0
    assert backward_transfer([[None, None], [1.0, None], [0.0, 1.0]]) == -1.0


def test_backward_transfer_drops_no_experience():
    # Each experience but the last has its own change: leaving one out changes the result.
    t = 5
    matrix = [[None] * t] + [[0.9 - 0.1 * j * (i > j) if j <= i else None for j in range(t)] for i in range(t)]
    assert backward_transfer(matrix) == pytest.approx(-(0.0 + 0.1 + 0.2 + 0.3) / 4)


def test_forgetting_per_experience_by_hand():
    assert forgetting_per_experience(CLASSES) == [
        [None, None, None],
        [None, None, None],
        [pytest.approx(0.3), None, None],
        [pytest.approx(0.2), pytest.approx(0.3), None],
    ]


def negative(values: Any) -> Any:
    return [negative(v) for v in values] if isinstance(values, list) else -values


def test_forgetting_ratio_from_untrained_to_joint():
    joint, start = [[0.5, 0.5], [1.0, 0.5], [0.9, 0.7]], [0.5, None]
    assert forgetting_ratio([[0.5, None], [1.0, None], [0.9, 0.7]], joint, start) == pytest.approx(0.0)
    assert forgetting_ratio([[0.5, None], [1.0, None], [0.5, 0.0]], joint, start) == pytest.approx(-1.0)
    same = [[0.5, 0.5], [1.0, 0.5], [0.5, 0.7]]  # no room to lose on the first
    assert forgetting_ratio([[0.5, None], [1.0, None], [0.2, 0.35]], same, start) == pytest.approx(-0.5)
    assert forgetting_ratio(joint, None, start) is None


def naive(
    matrix: list[list[float]], reference: list[list[float]], alone: list[list[float]], start: list[float]
) -> dict[str, float]:
    """The formulas as loops over 1 … T."""
    t = len(matrix[0])

    def r(i: int, j: int) -> float:
        return matrix[i][j - 1]

    everyone = range(1, t + 1)
    old = range(1, t)
    return {
        "average_accuracy": sum(r(t, j) for j in everyone) / t,
        "average_anytime_accuracy": sum(sum(r(i, j) for j in range(1, i + 1)) / i for i in everyone) / t,
        "average_forgetting": sum(max(r(i, j) for i in range(1, t)) - r(t, j) for j in old) / (t - 1),
        "backward_transfer": sum(r(t, j) - r(j, j) for j in old) / (t - 1),
        "forward_transfer": sum(r(j - 1, j) - r(0, j) for j in range(2, t + 1)) / (t - 1),
        "learning_accuracy": sum(r(j, j) for j in everyone) / t,
        "intransigence": sum(reference[j][j - 1] - r(j, j) for j in everyone) / t,
        "transfer": sum(r(j, j) - alone[j][j - 1] for j in everyone) / t,
        "forgetting_ratio": sum((r(t, j) - start[j - 1]) / (reference[t][j - 1] - start[j - 1]) - 1 for j in everyone)
        / t,
        "worst_accuracy": sum(min(r(i, j) for i in range(j + 1, t + 1)) for j in old) / (t - 1),
    }


@pytest.mark.parametrize("t", [2, 3, 7, 20])
def test_against_a_naive_loop(t: int):
    rng = np.random.default_rng(t)
    matrix, joint, alone = rng.random((3, t + 1, t)).tolist()
    start = rng.random(t).tolist()
    found = summarize(matrix, joint=joint, independent=alone, untrained=start)
    assert found == pytest.approx(naive(matrix, joint, alone, start), abs=1e-9)


@pytest.mark.parametrize("t", [2, 5])
def test_lower_is_better_turns_signs_once(t: int):
    """A perplexity P is judged like the higher-is-better score −P, with averages in the unit of P."""
    rng = np.random.default_rng(t)
    matrix, reference, alone = (5 + rng.random((3, t + 1, t))).tolist()
    start = (8 + rng.random(t)).tolist()
    references = {"joint": reference, "independent": alone, "untrained": start}
    lower = summarize(matrix, higher_is_better=False, **references)
    turned = [[-v for v in row] for row in matrix]
    higher = summarize(turned, **{n: negative(v) for n, v in references.items()})
    for name in (
        "average_forgetting",
        "backward_transfer",
        "forward_transfer",
        "intransigence",
        "transfer",
        "forgetting_ratio",
    ):
        assert lower[name] == pytest.approx(higher[name])
    for name in ("average_accuracy", "average_anytime_accuracy", "learning_accuracy", "worst_accuracy"):
        assert lower[name] == pytest.approx(-(higher[name] or math.nan))


def test_a_perplexity_that_rises_is_forgotten():
    matrix = [[90.0, 90.0], [10.0, 80.0], [30.0, 12.0]]
    found = summarize(matrix, higher_is_better=False)
    assert found["average_forgetting"] == 20.0
    assert found["backward_transfer"] == -20.0
    assert found["forward_transfer"] == 10.0  # 90 → 80 before it was trained: helped
    assert found["worst_accuracy"] == 30.0
    assert found["average_accuracy"] == 21.0


@pytest.mark.parametrize("matrix", [[], [[]], [[None, None, None]], [[0.1, 0.2, 0.3]]])
def test_nothing_learned_yet(matrix: list[list[float | None]]):
    assert summarize(matrix) == {metric.name: None for metric in METRICS}


@pytest.mark.parametrize("n", [1, 2])
def test_a_run_in_progress_is_a_run_over_a_shorter_stream(n: int):
    partial = DOMAINS[: n + 1]
    assert summarize(partial) == summarize([row[:n] for row in partial])


def test_one_experience_has_no_forgetting():
    found = summarize([[0.1], [0.8]])
    assert found["average_accuracy"] == found["learning_accuracy"] == found["average_anytime_accuracy"] == 0.8
    assert all(
        found[name] is None
        for name in ("average_forgetting", "backward_transfer", "forward_transfer", "worst_accuracy")
    )


def test_cells_without_meaning_are_left_out_and_not_zero():
    # Experience 2 has no test data.
    matrix = [[None] * 3, [0.8, None, None], [0.6, None, None], [0.4, None, 0.9]]
    found = summarize(matrix)
    assert found["average_accuracy"] == pytest.approx(0.65)
    assert found["average_forgetting"] == pytest.approx(0.4)
    assert found["worst_accuracy"] == pytest.approx(0.4)
    assert summarize([[None] * 2, [None] * 2, [None] * 2])["average_accuracy"] is None


def test_nan_is_no_value():
    assert average_accuracy([[None, None], [0.5, None], [math.nan, 0.7]]) == pytest.approx(0.7)


def test_task_incremental_row_zero_is_partly_known():
    # The head of task 1 exists before training; those of later tasks do not: no forward transfer.
    assert forward_transfer([[0.5, None], [0.9, None], [0.8, 0.9]]) is None


def test_intransigence_needs_a_reference_of_the_same_length():
    joint = [[None] * 3, [0.95, None, None], [0.9, 0.9, None], [0.9, 0.9, 0.9]]
    assert intransigence(CLASSES, None) is None
    assert intransigence(CLASSES, []) is None
    assert intransigence(CLASSES, joint) == pytest.approx((0.05 + 0.1 - 0.05) / 3)
    assert intransigence(CLASSES[:2], joint) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="reference has 2 experiences, the run 3"):
        intransigence(CLASSES, [[None, None], [1.0, None]])


@pytest.mark.parametrize("matrix", [[[0.1, 0.2], [0.3]], [[0.1], [0.2], [0.3]]])
def test_impossible_matrices_are_refused(matrix: list[list[float | None]]):
    with pytest.raises(ValueError, match="matrix has"):
        summarize(matrix)


def test_ranges_hold_at_the_extremes():
    t = 4
    ranges = {metric.name: metric.range for metric in METRICS}
    lost = [[0.0] * t] + [[1.0 if i == j else 0.0 for j in range(t)] for i in range(t)]
    gained = [[1.0] * t] + [[0.0] * t] * (t - 1) + [[1.0] * t]
    for matrix in (lost, gained, [[0.0] * t] * (t + 1), [[1.0] * t] * (t + 1)):
        for name, value in summarize(matrix, joint=lost, independent=lost, untrained=[0.0] * t).items():
            assert value is not None
            low, high = ranges[name]
            assert low <= value <= high
    assert average_forgetting(lost) == 1.0
    assert average_forgetting(gained) == -1.0
    assert backward_transfer(lost) == -1.0


def test_the_table_of_metrics_says_what_summarize_gives():
    assert [metric.name for metric in METRICS] == list(summarize(DOMAINS))
    assert all(m.formula and m.source and m.meaning and m.better in ("higher", "lower") for m in METRICS)


@pytest.mark.filterwarnings("ignore")  # what importing Avalanche sets off
def test_agrees_with_avalanche_on_the_same_predictions():
    """Against Avalanche's own metrics on the same predictions, with a short last batch in every experience."""
    import torch
    from avalanche.evaluation.metrics import Accuracy, Forgetting
    from avalanche.evaluation.metrics.forgetting_bwt import BWT

    generator = torch.Generator().manual_seed(3)
    t, theirs, forgetting, transfer = 4, [], Forgetting(), BWT()
    ours: list[list[float | None]] = [[None] * t]
    sizes = [37, 10, 64, 23]
    for i in range(t):
        row: list[float | None] = [None] * t
        for j in range(i + 1):
            labels = torch.randint(0, 5, (sizes[j],), generator=generator)
            logits = torch.randn(sizes[j], 5, generator=generator)
            logits[torch.arange(sizes[j]), labels] += 3.0 - 0.8 * (i - j)
            accuracy = Accuracy()
            for rows in torch.arange(sizes[j]).split(16):
                accuracy.update(logits[rows], labels[rows])
            row[j] = float((logits.argmax(1) == labels).float().mean())
            assert accuracy.result() == pytest.approx(row[j])
            for metric in (forgetting, transfer):
                metric.update(j, accuracy.result(), initial=i == j)
            if i == t - 1:
                theirs.append(accuracy.result())
        ours.append(row)
    assert average_accuracy(ours) == pytest.approx(np.mean(theirs))
    assert backward_transfer(ours) == pytest.approx(np.mean([transfer.result()[j] for j in range(t - 1)]))
    # Avalanche's forgetting starts from the first value, ours (Chaudhry) from the best: equal where these agree.
    first = [ours[j + 1][j] for j in range(t)]
    best = [max(v for row in ours[1:t] if (v := row[j]) is not None) for j in range(t - 1)]
    assert best == first[: t - 1]
    assert average_forgetting(ours) == pytest.approx(np.mean([forgetting.result()[j] for j in range(t - 1)]))


def test_single_metrics_agree_with_the_summary():
    found = summarize(DOMAINS)
    assert found["average_anytime_accuracy"] == average_anytime_accuracy(DOMAINS)
    assert found["learning_accuracy"] == learning_accuracy(DOMAINS)
    assert found["worst_accuracy"] == worst_accuracy(DOMAINS)
    assert found["forward_transfer"] == forward_transfer(DOMAINS)


def test_importing_the_metrics_imports_no_torch():
    code = "import sys, clplatform.metric.matrix; print([m for m in ('torch', 'hydra', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
