"""The head's share: known answers in readings that are made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clplatform.diagnosis.head_bias import accuracy, bias, head_bias, share
from clplatform.diagnosis.layers import FEATURES, Reading
from clplatform.diagnosis.probes import Probe, fit_probe
from clplatform.types import MASKED, ExperienceInfo

EXPERIENCES = [ExperienceInfo(k, f"e{k}", k, (2 * k, 2 * k + 1), 2 * k + 2) for k in range(3)]
CENTERS = 6 * torch.eye(6)


def reading(k: int, per_class: int, weight: Tensor, seed: int = 0, noise: float = 0.5) -> Reading:
    """Features around a center for each class of experience k; logits of a head with this weight [6, 6]."""
    labels = torch.tensor(EXPERIENCES[k].classes).repeat_interleave(per_class)
    g = torch.Generator().manual_seed(100 * k + seed)
    x = CENTERS[labels] + noise * torch.randn(len(labels), 6, generator=g)
    return Reading({FEATURES: x}, labels, torch.full_like(labels, k), x @ weight.T)


def readings(
    weight: Tensor, sizes: tuple[int, ...] = (10, 10, 10), noise: float = 0.5
) -> list[tuple[Reading, Reading]]:
    return [(reading(k, sizes[k], weight, 1, noise), reading(k, 8, weight, 2, noise)) for k in range(3)]


SCRAMBLED = torch.eye(6)[[4, 5, 0, 1, 2, 3]]


def test_a_scrambled_head_is_to_blame_for_all() -> None:
    found = head_bias(EXPERIENCES, readings(SCRAMBLED), [], [1.0, 1.0, 1.0], None)
    assert found["now"] == [0, 0, 0]
    assert found["refit"] == [1, 1, 1]
    assert found["shares"] == [1, 1]
    assert found["share"] == 1
    assert (found["forgotten"], found["recovered"]) == (1, 1)


def test_destroyed_features_do_not_recover() -> None:
    nothing = [(r.without_layers(), t.without_layers()) for r, t in readings(SCRAMBLED)]
    for pair in nothing:
        for r in pair:
            r.layers[FEATURES] = torch.ones(len(r.labels), 6)
    found = head_bias(EXPERIENCES, nothing, readings(SCRAMBLED), [1.0, 1.0, 1.0], None)
    assert sum(found["refit"]) <= 0.5 + 1e-9  # one answer for all: right for one class of six
    assert found["share"] <= 0.26
    assert found["untrained_share"] == 1  # the control has features


def test_the_new_head_is_fitted_to_all_experiences_alike() -> None:
    """Thirty times as many samples of the last experience do not pull overlapping classes to it."""
    few = head_bias(EXPERIENCES, readings(SCRAMBLED, (12, 12, 400), noise=4), [], [1.0] * 3, None)["refit"]
    assert few[0] > 0.25
    assert few[1] > 0.25


def test_where_tasks_are_known_a_sample_is_told_apart_within_its_task() -> None:
    """Features that say which of the two classes of a task it is, and not which task."""
    known = torch.zeros(3, 6, dtype=torch.bool)
    for k in range(3):
        known[k, list(EXPERIENCES[k].classes)] = True
    pairs = readings(SCRAMBLED)
    for pair in pairs:
        for r in pair:
            r.layers[FEATURES] = (r.labels % 2)[:, None].double()
            r.logits = r.logits.masked_fill(~known[r.task_labels], MASKED)
    found = head_bias(EXPERIENCES, pairs, [], [1.0] * 3, known)
    assert found["refit"] == [1, 1, 1]
    assert "task is known" in found["bias"]["left_out"]
    without = head_bias(EXPERIENCES, pairs, [], [1.0] * 3, None)
    assert sum(without["refit"]) <= 1 + 1e-9


def test_where_tasks_are_known_the_fit_does_not_see_other_tasks_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fit(features: Tensor, labels: Tensor, n_classes: int, **options: Any) -> Probe:
        seen.append((labels, options["allowed"]))
        return fit_probe(features, labels, n_classes, **options)

    monkeypatch.setattr("clplatform.diagnosis.head_bias.fit_probe", fit)
    known = torch.block_diag(*[torch.ones(1, 2)] * 3).bool()
    head_bias(EXPERIENCES, readings(SCRAMBLED), [], [1.0] * 3, known)
    ((labels, allowed),) = seen
    assert allowed.sum(1).eq(2).all()
    assert allowed.gather(1, labels[:, None]).all()


def test_bias_by_hand() -> None:
    logits = torch.tensor([[3.0, 0, 0, 0, 1, 2], [0, 1, 0, 0, 5, 0]])  # margins +1, −4
    newest = torch.tensor([[0.0, 0, 2.5, 0, 1, 2], [0, 0, 0, 0, 9, 0], [0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 3, 0]])
    tests = [
        Reading({}, torch.tensor([0, 1]), torch.zeros(2), logits),
        Reading({}, torch.tensor([2, 3]), torch.zeros(2), logits.flip(0) * 2),  # margins −8, +2
        Reading({}, torch.tensor([4, 4, 5, 5]), torch.zeros(4), newest),  # +0.5, −9, −1, −2
    ]
    found = bias(EXPERIENCES, tests, known_tasks=False)
    assert found["old_as_new"] == 0.5
    assert found["old_as_new_each"] == [0.5, 0.5]
    assert found["new_as_old"] == 0.25
    assert found["margin_old"] == pytest.approx((1 - 4 - 8 + 2) / 4)
    assert found["margin_new"] == pytest.approx((0.5 - 9 - 1 - 2) / 4)


def test_no_bias_where_there_are_no_new_classes() -> None:
    domains = [ExperienceInfo(k, f"e{k}", 0, (0, 1), 2) for k in range(2)]
    assert "no new classes" in bias(domains, [], known_tasks=False)["left_out"]
    assert "no new classes" in bias(domains[:1], [], known_tasks=False)["left_out"]


def test_shares() -> None:
    assert share(0.9, 0.5, 0.7) == pytest.approx(0.5)
    assert share(0.9, 0.5, 0.95) == pytest.approx(1.125)
    assert share(0.9, 0.5, 0.4) == pytest.approx(-0.25)
    assert share(0.5, 0.495, 0.9) is None  # nothing was forgotten
    assert share(0.5, 0.6, 0.9) is None
    assert share(None, 0.6, 0.9) is None


def test_accuracy_of_answers() -> None:
    assert accuracy(reading(0, 4, torch.eye(6), noise=0.1)) == 1
