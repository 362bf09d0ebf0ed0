"""LoRA experts: what is frozen stays so to the bit, and every sample goes through the right expert."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Recorder
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.metric.flops import measure
from clplatform.module import lora
from clplatform.strategy.base import Chain, n_bytes
from clplatform.strategy.lora_experts import LoRAExperts
from clplatform.types import MASKED

# Decay and momentum reach parameters that have no gradient, if they are in the optimizer at all.
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


def make(**changes: Any) -> LoRAExperts:
    strategy = from_page("lora_experts", **changes)
    assert isinstance(strategy, LoRAExperts)
    return strategy


def run(folder: Path, stream: Any = None, **changes: Any) -> tuple[Any, Any, Recorder]:
    strategy, recorder, stream = make(**changes), Recorder(), stream or TinyStream()
    start = make_text_experiment if isinstance(stream, TinyTextStream) else make_experiment
    strategies = {"lora_experts": strategy, "recorder": recorder}
    experiment = start(folder, strategies, stream=stream, optimizer=ADAMW, trainer={"max_epochs": 4})
    experiment.run()
    return experiment.learner.eval(), stream, recorder


def adapters(state: dict[str, Tensor], experience: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if f".experience_{experience}." in name}


ROWS = "extras.lora_experts.head.linear.weight"


@pytest.mark.parametrize("first", ["full", "adapter"])
def test_earlier_experts_and_the_backbone_are_untouched(first: str, tmp_path: Path) -> None:
    _, _, recorder = run(tmp_path, first=first)
    own = [name for name in recorder.before[0] if name.startswith("backbone") and "lora" not in name]
    assert len(own) == 2
    for i in range(3):
        before, after = recorder.before[i], recorder.after[i]
        trains_all = first == "full" and i == 0
        assert [torch.equal(before[n], after[n]) for n in own] == [not trains_all] * 2
        changed = [not torch.equal(t, after[n]) for n, t in adapters(before, i).items()]
        assert changed == [not trains_all] * 2  # A and B
        for earlier in range(i):
            kept = adapters(before, earlier)
            assert kept
            assert all(torch.equal(t, after[n]) for n, t in kept.items())
        assert torch.equal(before[ROWS][: 2 * i], after[ROWS][: 2 * i])
        assert not (before[ROWS][2 * i :] == after[ROWS][2 * i :]).any()
        assert torch.equal(before["head.linear.weight"], after["head.linear.weight"])  # not used


def test_a_new_expert_starts_as_the_backbone_itself(tmp_path: Path) -> None:
    """B = 0: the adapter changes nothing before it is trained."""
    _, _, recorder = run(tmp_path, first="adapter")
    for i, state in enumerate(recorder.before):
        b = [t for n, t in adapters(state, i).items() if "lora_B" in n]
        assert len(b) == 1
        assert not b[0].any()


def by_hand(state: dict[str, Tensor], x: Tensor, expert: int | None) -> Tensor:
    """tanh((W + α/r · B A) x + b) of one expert, or of the bare backbone; α/r = 16/2."""
    layer = "backbone.layer."
    weight = state[layer + "base_layer.weight"]
    if expert is not None:
        a, b = (state[f"{layer}lora_{part}.experience_{expert}.weight"] for part in "AB")
        weight = weight + 16 / 2 * b @ a
    return (x.flatten(1) @ weight.T + state[layer + "base_layer.bias"]).tanh()


def means_by_hand(state: dict[str, Tensor], stream: Any) -> Tensor:
    """Mean of the normalised bare features of each class of each experience, [M, D]."""
    means = []
    for experience in stream:
        batch = experience.train.fetch(torch.arange(len(experience.train)))
        features = F.normalize(by_hand(state, batch["pixel_values"], None), dim=1)
        means += [features[batch["labels"] == k].mean(0) for k in experience.classes]
    return torch.stack(means)


def mixed(stream: Any) -> dict[str, Tensor]:
    """Test samples of all experiences in one batch, shuffled."""
    batches = [e.test.fetch(torch.arange(len(e.test))) for e in stream]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    names = batches[0].keys()
    return {n: torch.cat([b[n] for b in batches])[order] for n in names}


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
@torch.no_grad()
def test_every_row_goes_through_its_expert(scenario: str, tmp_path: Path) -> None:
    """By task id where it is known, else by the nearest class mean of the bare features; one pass for all rows."""
    with torch.enable_grad():
        learner, stream, recorder = run(tmp_path, TinyStream(scenario=scenario, noise=1.0), first="adapter")
    state, batch = recorder.after[-1], mixed(stream)
    if scenario == "task_incremental":
        expert = batch["task_labels"]
    else:
        means = means_by_hand(state, stream)
        torch.testing.assert_close(state["extras.lora_experts.means"], means)
        bare = by_hand(state, batch["pixel_values"], None)
        similarity = torch.stack([F.cosine_similarity(bare, m[None]) for m in means], 1)
        expert = similarity.argmax(1) // 2
    assert len(expert.unique()) == 3
    weight, bias = state[ROWS], state[ROWS.replace("weight", "bias")]
    logits = learner(batch).logits
    for i, e in enumerate(expert.tolist()):
        features = by_hand(state, batch["pixel_values"][i : i + 1], e)
        expected = features @ weight[2 * e : 2 * e + 2].T + bias[2 * e : 2 * e + 2]
        classes = list(stream[e].classes)
        torch.testing.assert_close(logits[i : i + 1, classes], expected, rtol=1e-4, atol=1e-5)
        others = [k for k in range(logits.shape[1]) if k not in classes]
        assert (logits[i, others] == MASKED).all()


@torch.no_grad()
def test_text_batches_of_mixed_experts_equal_one_row_at_a_time(tmp_path: Path) -> None:
    with torch.enable_grad():
        learner, stream, recorder = run(tmp_path, TinyTextStream())
    names = [n for n in recorder.after[-1] if "lora_A" in n]
    assert len(names) == 3 * 2  # queries and values of one layer, for each experience
    batch = {n: torch.cat([e.test.columns[n] for e in stream]) for n in stream[0].test.columns}
    together = learner(batch)
    assert len((together.logits.argmax(1) // 2).unique()) == 3  # all experts are asked
    for i in range(48):
        length = int(batch["attention_mask"][i].sum())
        row = {n: c[i : i + 1, :length] if c.ndim == 2 else c[i : i + 1] for n, c in batch.items()}
        alone = learner(row)
        torch.testing.assert_close(together.logits[i], alone.logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.features[i], alone.features[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_learned_later_does_not_change_how_an_earlier_expert_answers(tmp_path: Path) -> None:
    stream, answers = TinyStream(scenario="task_incremental"), []
    experiment = make_experiment(tmp_path, {"lora_experts": make()}, stream=stream, optimizer=ADAMW)
    batch, record = stream[0].test.fetch(torch.arange(16)), experiment._record

    def spy(experience: Any, times: Any) -> None:
        with torch.no_grad():
            answers.append(experiment.learner.eval()(batch).logits[:, :2])
        record(experience, times)

    experiment._record = spy  # type: ignore[method-assign]
    with torch.enable_grad():
        experiment.run()
    for later in answers[1:]:  # equal but for rounding: the matrix product has got wider
        torch.testing.assert_close(later, answers[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("other", ["replay", "derpp", "ewc", "lwf", "joint", "cumulative", "avalanche"])
def test_is_combined_with_nothing_that_needs_one_model(other: str) -> None:
    pair = f"(lora_experts cannot be combined with {other}|{other} cannot be combined with lora_experts) .*: [a-z]+"
    with pytest.raises(ValueError, match=pair):
        Chain({other: from_page(other), "lora_experts": make()})


def test_extra_parameters_are_adapters_classifiers_and_means(tmp_path: Path) -> None:
    learner, _, _ = run(tmp_path)
    per_adapter, per_class = 2 * (12 + 16), 16 + 1 + 16  # r (d_in + d_out); weights, bias and mean
    assert learner.chain.cost() == {"extra_parameters": 3 * per_adapter + 6 * per_class}


@torch.no_grad()
def test_an_evaluation_between_training_steps_asks_the_bare_backbone(tmp_path: Path) -> None:
    """A training step leaves its adapter active; the nearest mean must not be looked for through it."""
    with torch.enable_grad():
        learner, stream, _ = run(tmp_path, first="adapter")
    batch = mixed(stream)
    expected = learner(batch).logits
    learner.train()(stream[2].train.fetch(torch.arange(8)))
    assert torch.equal(learner.eval()(batch).logits, expected)


def test_a_training_step_is_counted_with_its_adapter_and_its_gradients(tmp_path: Path) -> None:
    strategies = {"lora_experts": make(first="adapter")}
    experiment = make_experiment(tmp_path, strategies, stream=TinyStream(2), optimizer=ADAMW)
    experiment.run()
    backbone = experiment.learner.backbone
    lora.activate(backbone, ["experience_1"])
    step, ask = (measure(backbone, (1, 1, 12), gradients) for gradients in (True, False))
    assert step > ask > 2 * 12 * 16
    assert experiment.results.cost["flops"] == 2 * 32 * (2 * step + ask)  # two epochs, and one pass for the means


def test_what_is_kept_grows_by_an_expert_with_each_experience(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, {"lora_experts": make(first="adapter")}, optimizer=ADAMW)
    kept = experiment.run().kept_bytes
    assert len(kept) == 3 and kept[-1] == n_bytes(experiment.learner.chain.cost())
    assert kept[2] > kept[1] > kept[0] > 0
