"""Probes against scikit-learn's logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from clplatform.diagnosis.probes import balanced, fit_probe
from clplatform.types import MASKED


def data(n: int = 90, d: int = 5, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes of different sizes; features of different scales."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1][:k]), n, replacement=True, generator=g)
    centers = torch.randn(k, d, generator=torch.Generator().manual_seed(99))
    return (centers[labels] + torch.randn(n, d, generator=g)) * torch.tensor([1.0, 100, 0.01, 3, 1]) + 5, labels


def sklearns(x: Tensor, y: Tensor, weights: Tensor | None, c: float) -> tuple[np.ndarray, np.ndarray]:
    z = StandardScaler().fit_transform(x.double().numpy())
    model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
    model.fit(z, y.numpy(), None if weights is None else (weights / weights.mean()).numpy())
    return model.coef_, model.intercept_


@pytest.mark.parametrize("c", [0.01, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_solution_is_scikit_learn_s(c: float, weighted: bool) -> None:
    x, y = data()
    weights = balanced(y) if weighted else None
    probe = fit_probe(x, y, 3, weights=weights, c=c)
    weight, bias = sklearns(x, y, weights, c)
    np.testing.assert_allclose(probe.weight, weight, atol=1e-4)
    np.testing.assert_allclose(probe.bias - probe.bias.mean(), bias - bias.mean(), atol=1e-4)


def test_accuracy_on_other_samples() -> None:
    x, y = data()
    new_x, new_y = data(seed=1)
    scaler = StandardScaler().fit(x.double().numpy())
    model = LogisticRegression(tol=1e-10, max_iter=10_000).fit(scaler.transform(x.double().numpy()), y.numpy())
    expected = model.score(scaler.transform(new_x.double().numpy()), new_y.numpy())
    assert 0.4 < expected < 1
    assert fit_probe(x, y, 3).accuracy(new_x, new_y) == pytest.approx(expected)


def test_classes_that_a_sample_may_not_have_play_no_part() -> None:
    """With a task's classes known, one probe is as good as one for each task: the fit of a task's classes does not see
    the other's samples but through the standardization."""
    x, y = data(k=2)
    other = y + 2
    allowed = torch.zeros(180, 4, dtype=torch.bool)
    allowed[:90, :2], allowed[90:, 2:] = True, True
    both = fit_probe(torch.cat([x, -x]), torch.cat([y, other]), 4, allowed=allowed)
    logits = both.logits(x, allowed[:90])
    assert (logits[:, 2:] == MASKED).all()
    alone = fit_probe(
        torch.cat([x, -x]), torch.cat([y, y]), 2, weights=torch.cat([torch.ones(90), torch.zeros(90)]), c=0.5
    )
    # Weights of mean one: each counts twice, so half of C is the same penalty.
    difference = (logits[:, 0] - logits[:, 1]) - alone.logits(x).diff().neg()[:, 0]
    assert difference.abs().max() < 1e-3


def test_constant_features_are_no_problem() -> None:
    y = torch.tensor([0, 1] * 10)
    probe = fit_probe(torch.full((20, 3), 0.1), y, 2)
    assert probe.accuracy(torch.full((4, 3), 0.1), torch.tensor([0, 0, 1, 1])) == 0.5
    assert torch.isfinite(probe.weight).all()
    assert probe.accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) is None


def test_balanced_weights() -> None:
    groups, labels = torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 0, 0, 0])
    weights = balanced(groups, labels)
    np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 1, 1 / 2, 1 / 2, 1 / 3])
