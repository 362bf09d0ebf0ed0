"""The linear probe against a hand-written loop over fixed features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Recorder
from prototypes import NormBackbone, norm_backbone, spoil
from strategies import from_page
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyStream, make_experiment, same, weights

from clplatform.head.cosine import CosineHead
from clplatform.strategy.base import Chain, Strategy
from clplatform.strategy.linear_probe import LinearProbe
from clplatform.types import Batch, ExperienceInfo


def make(lr: float | None = None) -> LinearProbe:
    strategy = from_page("linear_probe", lr=lr)
    assert isinstance(strategy, LinearProbe)
    return strategy


def run(folder: Path, strategies: dict[str, Strategy], **options: Any) -> tuple[Any, Recorder]:
    recorder = Recorder()
    experiment = make_experiment(folder, {**strategies, "recorder": recorder}, **options)
    experiment.run()
    return experiment, recorder


def features(state: dict[str, Tensor], batch: Batch, name: str = "pixel_values") -> Tensor:
    """Of the backbone with batch normalisation in eval mode, written out."""
    norm = {n: state[f"backbone.norm.{n}"] for n in ("running_mean", "running_var", "weight", "bias")}
    x = batch[name].flatten(1)
    x = (x - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
    return (x @ state["backbone.layer.weight"].T + state["backbone.layer.bias"]).tanh()


@pytest.mark.parametrize("names", [(), ("replay",)], ids=["alone", "with replay"])
@pytest.mark.parametrize("lr", [None, 0.02])
def test_equals_a_hand_written_loop(lr: float | None, names: tuple[str, ...], tmp_path: Path) -> None:
    """With dropout, batch normalisation and an augmentation that would leave nothing of a sample."""
    strategies = {**{name: from_page(name) for name in names}, "linear_probe": make(lr)}
    experiment, recorder = run(tmp_path, strategies, backbone=norm_backbone(), augment=spoil)
    weight = bias = torch.zeros(0)
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        n = len(weight)
        weight = torch.cat([weight.detach().view(n, 16), start["head.linear.weight"][n:]]).requires_grad_()
        bias = torch.cat([bias.detach(), start["head.linear.bias"][n:]]).requires_grad_()
        optimizer = torch.optim.SGD([weight, bias], lr=lr or 0.1, momentum=0.9)
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(features(start, batch) @ weight.T + bias, batch["labels"]).backward()
            optimizer.step()
    assert (len(recorder.batches[-1][0]["labels"]) > 8) == bool(names)
    found = weights(experiment.learner)
    torch.testing.assert_close(found["head.linear.weight"], weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["head.linear.bias"], bias.detach(), rtol=1e-4, atol=1e-5)
    own = [name for name in found if name.startswith("backbone.")]
    assert same({n: found[n] for n in own}, {n: recorder.before[0][n] for n in own})


def passes(backbone: NormBackbone, learner: Any) -> list[int]:
    """Rows that pass through the backbone in the training of each experience."""
    found: list[int] = []
    start, after = learner.chain.before_experience, learner.chain.after_experience

    def before_experience(learner: Any, experience: Any) -> None:
        backbone.rows.clear()
        start(learner, experience)

    def after_experience(learner: Any, experience: Any) -> None:
        found.append(sum(backbone.rows))
        after(learner, experience)

    learner.chain.before_experience, learner.chain.after_experience = before_experience, after_experience
    return found


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (["linear_probe"], [32, 32, 32]),
        (["cumulative", "linear_probe"], [32, 64, 96]),
        (["linear_probe", "cumulative"], [32, 64, 96]),
        (["replay", "linear_probe"], [32, 32 + 2 * 32, 32 + 2 * 32]),  # as many replayed rows as new ones, twice
        (["linear_probe", "replay"], [32, 32 + 2 * 32, 32 + 2 * 32]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_features_of_an_experience_are_computed_once(order: list[str], expected: list[int], tmp_path: Path) -> None:
    backbone = norm_backbone()
    strategies = {name: from_page(name) for name in order}
    experiment = make_experiment(tmp_path, strategies, backbone=backbone)
    found = passes(backbone, experiment.learner)
    experiment.run()
    assert found == expected


class Freeze(Strategy):
    """The backbone is frozen, and runs in every step."""

    def build(self, learner: Any, info: ExperienceInfo) -> None:
        learner.backbone.requires_grad_(False)


@pytest.mark.parametrize("other", ["lwf", "ewc", "replay", "derpp", "a_gem", "mir", "lfl", "cumulative", "joint"])
def test_is_what_running_the_frozen_backbone_in_every_step_is(other: str, tmp_path: Path) -> None:
    """Together with others: teachers answer with their own heads, memories and penalties see the same."""
    a, _ = run(tmp_path / "a", {other: from_page(other), "linear_probe": make()})
    b, _ = run(tmp_path / "b", {other: from_page(other), "freeze": Freeze()})
    c, _ = run(tmp_path / "c", {"linear_probe": make(), other: from_page(other)})
    for found in (a, c):
        head, expected = (weights(x.learner)["head.linear.weight"] for x in (found, b))
        torch.testing.assert_close(head, expected, rtol=1e-4, atol=1e-5)


def test_samples_in_several_versions_are_told_apart(tmp_path: Path) -> None:
    """Permuted copies of one data set share their indices; trained on together they are not looked up."""
    stream = TinyStream(scenario="domain_incremental")
    for e in stream.experiences:
        e.train.columns["index"] = torch.arange(32)  # type: ignore[attr-defined]
    a, _ = run(tmp_path / "a", {"cumulative": from_page("cumulative"), "linear_probe": make()}, stream=stream)
    b, _ = run(tmp_path / "b", {"cumulative": from_page("cumulative"), "freeze": Freeze()}, stream=stream)
    c, _ = run(tmp_path / "c", {"replay": from_page("replay"), "linear_probe": make()}, stream=stream)
    d, _ = run(tmp_path / "d", {"replay": from_page("replay"), "freeze": Freeze()}, stream=stream)
    for found, expected in ((a, b), (c, d)):
        torch.testing.assert_close(weights(found.learner), weights(expected.learner), rtol=1e-4, atol=1e-5)


def test_only_the_head_is_in_the_optimizer(tmp_path: Path) -> None:
    experiment, _ = run(tmp_path, {"linear_probe": make(0.02)})
    groups = experiment.learner.make_optimizer().param_groups
    head = {id(p) for p in experiment.learner.head.parameters()}
    assert {id(p) for g in groups for p in g["params"]} == head
    assert {g["lr"] for g in groups} == {0.02}


def test_nothing_is_held_between_experiences(tmp_path: Path) -> None:
    strategy = make()
    run(tmp_path, {"linear_probe": strategy})
    assert strategy.features.keys.numel() == strategy.features.features.numel() == 0
    assert strategy.cost() == {}


@pytest.mark.parametrize("other", ["lora_experts", "seq_star", "ncm", "independent"])
def test_is_combined_with_nothing_that_changes_the_features(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Chain({"linear_probe": make(), other: from_page(other)})


def test_any_head_is_trained(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, {"linear_probe": make()})
    experiment.learner.make_head = lambda: CosineHead(feature_size=16, scale=10.0)
    experiment.learner.head = experiment.learner.make_head()
    experiment.run()
    head: Any = experiment.learner.head
    assert head.scale != 10
    assert isinstance(head.weight, nn.Parameter) and len(head.weight) == 6
