"""NCM against scikit-learn, on all data at once."""

from __future__ import annotations

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
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid
from strategies import from_page
from world import TinyStream

from clplatform.strategy.ncm import NCM

SCENARIOS = ["class_incremental", "domain_incremental"]


def make(metric: str = "cosine") -> Any:
    strategy = from_page("ncm", metric=metric)
    assert isinstance(strategy, NCM)
    return strategy


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_euclidean_is_the_nearest_centroid_of_all_data(scenario: str, tmp_path: Path) -> None:
    stream = unbalanced(scenario)
    learner = run(tmp_path, make("euclidean"), stream=stream)
    train, test = joined(stream), joined(stream, "test")
    x = features_of(learner, test).numpy()
    reference = NearestCentroid().fit(features_of(learner, train).numpy(), train["labels"].numpy())
    logits = answers(learner, test)
    assert np.array_equal(logits.argmax(1).numpy(), reference.predict(x))
    assert 0.5 < (logits.argmax(1) == test["labels"]).float().mean() < 1  # samples where it is decided
    distance = ((x[:, None] - reference.centroids_) ** 2).sum(2)
    expected = torch.from_numpy(-distance / 2).log_softmax(1).float()  # p ∝ exp −½ d²
    torch.testing.assert_close(logits.log_softmax(1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_cosine_is_the_cosine_to_means_of_normalised_features(scenario: str, tmp_path: Path) -> None:
    stream = unbalanced(scenario)
    learner = run(tmp_path, make("cosine"), stream=stream)
    train, test = joined(stream), joined(stream, "test")
    x, y = features_of(learner, train).numpy(), train["labels"].numpy()
    means = np.stack([np.mean([f / np.linalg.norm(f) for f in x[y == k]], axis=0) for k in range(y.max() + 1)])
    expected = cosine_similarity(features_of(learner, test).numpy(), means)
    torch.testing.assert_close(answers(learner, test), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)
    raw = np.stack([x[y == k].mean(0) for k in range(y.max() + 1)])
    assert np.abs(cosine_similarity(features_of(learner, test).numpy(), raw) - expected).max() > 1e-3  # not the same


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_one_pass_for_each_experience(metric: str, tmp_path: Path) -> None:
    check_one_pass(tmp_path, lambda: make(metric))


def test_prediction_needs_the_model_only(tmp_path: Path) -> None:
    check_rebuilt(tmp_path, make)


def test_a_run_that_breaks_off_counts_an_experience_once(tmp_path: Path) -> None:
    check_broken_off(tmp_path, make)


def test_only_the_task_s_own_and_known_classes_are_answers(tmp_path: Path) -> None:
    check_masks(tmp_path, make)


def test_nothing_is_forgotten(tmp_path: Path) -> None:
    """What an experience adds does not change the means of other classes, to the bit."""
    stream = TinyStream()
    strategy = make()
    run(tmp_path, strategy, stream=stream)
    alone = make()
    short = TinyStream()
    short.experiences = short.experiences[:1]
    run(tmp_path / "b", alone, stream=short)
    assert torch.equal(strategy.moments.means[:2], alone.moments.means)
