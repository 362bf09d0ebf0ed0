"""SLDA against scikit-learn's discriminant analysis of all data at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prototypes import (
    answers,
    check_broken_off,
    check_masks,
    check_one_pass,
    check_rebuilt,
    features_of,
    joined,
    run,
    unbalanced,
)
from sklearn.base import BaseEstimator
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from strategies import from_page
from torch import Tensor

from clplatform.strategy.slda import SLDA


def make(**changes: Any) -> Any:
    strategy = from_page("slda", **changes)
    assert isinstance(strategy, SLDA)
    return strategy


class TowardsIdentity(BaseEstimator):
    """(1 − ε) Σ + ε I of one class, which scikit-learn averages over the classes by their frequency."""

    def __init__(self, shrinkage: float = 0.0) -> None:
        self.shrinkage = shrinkage

    def fit(self, x: np.ndarray) -> Any:
        own = np.cov(x.T, bias=True)
        self.covariance_ = (1 - self.shrinkage) * own + self.shrinkage * np.eye(len(own))
        return self


def reference(target: str, shrinkage: float, x: Tensor, y: Tensor) -> LinearDiscriminantAnalysis:
    if target == "scaled":
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    else:
        model = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=TowardsIdentity(shrinkage))
    return model.fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("shrinkage", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("target", ["identity", "scaled"])
@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_is_the_discriminant_analysis_of_all_data(scenario: str, target: str, shrinkage: float, tmp_path: Path) -> None:
    stream = unbalanced(scenario)
    learner = run(tmp_path, make(shrinkage=shrinkage, target=target), stream=stream)
    train, test = joined(stream), joined(stream, "test")
    model = reference(target, shrinkage, features_of(learner, train), train["labels"])
    logits = answers(learner, test)
    # Classes are equally frequent to SLDA; the frequencies that scikit-learn adds are added here too.
    frequency = torch.bincount(train["labels"]).double().log()
    assert frequency.max() - frequency.min() > 0.1
    found = (logits + frequency).log_softmax(1)
    expected = model.predict_log_proba(features_of(learner, test).numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)
    assert 0.5 < (logits.argmax(1) == test["labels"]).float().mean() < 1


def test_the_order_of_experiences_does_not_matter(tmp_path: Path) -> None:
    found = []
    for i, order in enumerate([(0, 1, 2), (2, 0, 1)]):
        stream, strategy = unbalanced("domain_incremental"), make()
        run(tmp_path / str(i), strategy, stream=reordered(stream, order))
        found.append(strategy.moments)
    torch.testing.assert_close(found[0].covariance, found[1].covariance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0].means, found[1].means, rtol=1e-12, atol=1e-12)


def reordered(stream: Any, order: tuple[int, ...]) -> Any:
    stream.experiences = [replace(stream.experiences[j], index=i) for i, j in enumerate(order)]
    return stream


def test_the_covariance_decides(tmp_path: Path) -> None:
    """It is no nearest mean: shrunk all the way, it would be."""
    stream = unbalanced()
    test = joined(stream, "test")
    far = answers(run(tmp_path / "a", make(shrinkage=1.0), stream=stream), test)
    near = answers(run(tmp_path / "b", make(), stream=unbalanced()), test)
    means = answers(run(tmp_path / "c", from_page("ncm", metric="euclidean"), stream=unbalanced()), test)
    torch.testing.assert_close(far, means, rtol=1e-4, atol=1e-4)
    assert (near.argmax(1) != means.argmax(1)).any()


def test_one_pass_for_each_experience(tmp_path: Path) -> None:
    check_one_pass(tmp_path, make)


def test_prediction_needs_the_model_only(tmp_path: Path) -> None:
    check_rebuilt(tmp_path, make)


def test_a_run_that_breaks_off_counts_an_experience_once(tmp_path: Path) -> None:
    check_broken_off(tmp_path, make)


def test_only_the_task_s_own_and_known_classes_are_answers(tmp_path: Path) -> None:
    check_masks(tmp_path, make)
