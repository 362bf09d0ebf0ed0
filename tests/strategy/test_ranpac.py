"""RanPAC against scikit-learn's ridge regression of all data at once, on the projected features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import Recorder
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
from sklearn.linear_model import Ridge
from strategies import from_page
from torch import Tensor, nn
from world import TinyStream, make_experiment, same

from clplatform.strategy.base import Chain, Run, Strategy
from clplatform.strategy.ranpac import RIDGES, RanPAC
from clplatform.types import Batch, Output


def make(**changes: Any) -> Any:
    strategy = from_page("ranpac", **changes)
    assert isinstance(strategy, RanPAC)
    return strategy


def projected(learner: Any, batch: Batch) -> np.ndarray:
    """max(0, Wᵀ φ), written out."""
    h = features_of(learner, batch).numpy() @ learner.extras["ranpac"].projection.double().numpy()
    return np.where(h > 0, h, 0)


@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_is_the_ridge_regression_of_all_data(scenario: str, size: int, tmp_path: Path) -> None:
    stream = unbalanced(scenario)
    learner = run(tmp_path, make(size=size, ridge=30.0), stream=stream)
    train, test = joined(stream), joined(stream, "test")
    target = np.eye(int(train["labels"].max()) + 1)[train["labels"].numpy()]
    model = Ridge(alpha=30.0, fit_intercept=False, solver="svd").fit(projected(learner, train), target)
    found = answers(learner, test)
    np.testing.assert_allclose(found.numpy(), model.predict(projected(learner, test)), rtol=1e-3, atol=1e-5)
    assert 0.4 < (found.argmax(1) == test["labels"]).float().mean() < 1


@pytest.mark.parametrize("size", [8, 200], ids=["more samples than features", "fewer"])
def test_the_ridge_is_chosen_on_held_out_samples_of_the_experience(size: int) -> None:
    """The first fifth in a random order; of all candidates the one with the smallest squared error on it."""
    g = torch.Generator().manual_seed(3)
    strategy, w = make(size=size), torch.randn(6, size, generator=g, dtype=torch.float64)

    def project(x: Tensor) -> Tensor:
        return (x.double() @ w).relu()

    twin = torch.Generator().manual_seed(11)
    seed = torch.Generator().manual_seed(11)
    gram, cross = np.zeros((size, size)), np.zeros((size, 3))
    for _ in range(2):
        x, y = torch.randn(50, 6, generator=g), torch.eye(3).double()[torch.randint(3, (50,), generator=g)]
        y = y + torch.randn(50, 3, generator=g)  # any target
        chosen = strategy.add(x, y, project, seed)
        order = torch.randperm(50, generator=twin)
        h = project(x).numpy()
        held, rest = order[:10].numpy(), order[10:].numpy()
        errors = []
        for strength in RIDGES:
            model = Ridge(alpha=strength, fit_intercept=False, solver="svd").fit(h[rest], y.numpy()[rest])
            errors.append(((model.predict(h[held]) - y.numpy()[held]) ** 2).mean())
        assert chosen == RIDGES[int(np.argmin(errors))]
        gram, cross = gram + h.T @ h, cross + h.T @ y.numpy()  # of all samples, the held-out ones too
        np.testing.assert_allclose(strategy.gram.numpy(), gram, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(strategy.cross.numpy(), cross, rtol=1e-9, atol=1e-9)


def test_candidates_are_the_paper_s() -> None:
    assert np.allclose(RIDGES, 10.0 ** np.arange(-8, 9))


def test_a_single_sample_is_learned(tmp_path: Path) -> None:
    stream = TinyStream()
    strategy = make()
    learner = make_experiment(tmp_path, {"ranpac": strategy}, stream=stream).learner
    learner.build(stream[0].info)
    readout = learner.extras["ranpac"]
    assert strategy.add(torch.ones(1, 16), torch.eye(2).double()[:1], readout.project, learner.generator) == 1.0
    assert strategy.gram.any()


def test_the_projection_is_standard_normal_and_its_seed_the_run_s(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        learner = run(tmp_path / name, make(size=1000), seed=seed, stream=TinyStream(1))
        found.append(learner.extras["ranpac"].projection)
    assert found[0].shape == (16, 1000)
    assert found[0].mean().abs() < 0.03
    assert abs(found[0].std() - 1) < 0.03
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_one_pass_for_each_experience(tmp_path: Path) -> None:
    check_one_pass(tmp_path, make)


def test_prediction_needs_the_model_only(tmp_path: Path) -> None:
    check_rebuilt(tmp_path, make)


def test_a_run_that_breaks_off_counts_an_experience_once(tmp_path: Path) -> None:
    check_broken_off(tmp_path, make)


def test_only_the_task_s_own_and_known_classes_are_answers(tmp_path: Path) -> None:
    check_masks(tmp_path, make)


# -- first session ------------------------------------------------------------------------------------------------


class Shift(Strategy):
    """What parameter-efficient tuning looks like: something trainable around the backbone."""

    family = "prompt"

    def build(self, learner: Any, info: Any) -> None:
        if "shift" not in learner.extras:
            learner.extras["shift"] = nn.ParameterDict({"value": nn.Parameter(torch.zeros(12))})
            learner.backbone.requires_grad_(False)

    def forward(self, learner: Any, batch: Batch, run: Run) -> Output:
        return run({**batch, "pixel_values": batch["pixel_values"] + learner.extras["shift"]["value"]})


def test_the_first_session_trains_once_and_nothing_after(tmp_path: Path) -> None:
    watch, stream = Recorder(), TinyStream()
    experiment = make_experiment(tmp_path, {"watch": watch, "ranpac": make(first_session=True)}, stream=stream)
    experiment.run()
    assert experiment.results.cost["steps"] == 8
    plain = make_experiment(tmp_path / "b", {"recorder": (recorder := Recorder())})
    plain.run()
    backbone = ["backbone.layer.weight", "backbone.layer.bias"]
    for name in backbone:  # the usual training
        assert torch.equal(watch.after[0][name], recorder.after[0][name])
        assert not torch.equal(watch.after[0][name], watch.before[0][name])
        assert torch.equal(watch.after[0][name], watch.after[2][name])
    assert experiment.results.matrix[3] == pytest.approx([1, 1, 1], abs=0.2)


def test_composes_with_tuning_of_few_parameters(tmp_path: Path) -> None:
    """The adapter is trained in the first session, stands in the features of all experiences, and is not touched after."""
    watch, stream = Recorder(), unbalanced()
    strategies: dict[str, Strategy] = {"watch": watch, "shift": Shift(), "ranpac": make(first_session=True, ridge=30.0)}
    experiment = make_experiment(tmp_path, strategies, stream=stream)
    experiment.run()
    learner, shift = experiment.learner, "extras.shift.value"
    assert watch.after[0][shift].abs().min() > 0
    assert torch.equal(watch.after[0][shift], watch.after[2][shift])
    assert same(*({n: t for n, t in w.items() if n.startswith("backbone")} for w in (watch.before[0], watch.after[2])))
    train, test = joined(stream), joined(stream, "test")
    shifted = [
        {**b, "pixel_values": b["pixel_values"] + learner.extras["shift"]["value"].detach()} for b in (train, test)
    ]
    target = np.eye(6)[train["labels"].numpy()]
    model = Ridge(alpha=30.0, fit_intercept=False, solver="svd").fit(projected(learner, shifted[0]), target)
    found = answers(learner, test).numpy()
    np.testing.assert_allclose(found, model.predict(projected(learner, shifted[1])), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("other", ["replay", "ewc", "lwf", "finetuning", "ncm", "lora_experts"])
def test_is_combined_with_nothing_that_trains_on(other: str) -> None:
    with pytest.raises(ValueError, match="(ranpac cannot be combined with|cannot be combined with ranpac|both)"):
        Chain({other: from_page(other), "ranpac": make()})
