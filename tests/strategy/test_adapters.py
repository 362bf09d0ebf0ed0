"""Adapters: what is frozen stays so to the bit, and every sample goes through its own experience's adapters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import VIT, configuration
from naive import Recorder
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, tiny_vit

from clplatform import build
from clplatform.metric.flops import measure
from clplatform.module import adapter
from clplatform.strategy.adapters import AdapterCL
from clplatform.strategy.base import Chain
from clplatform.types import MASKED, ClplatformError

# Decay and momentum reach parameters that have no gradient, if they are in the optimizer at all.
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
ROWS = "extras.adapters.head.linear.weight"
BOTTLENECK = 5


def make(**changes: Any) -> AdapterCL:
    strategy = from_page("adapters", **{"bottleneck": BOTTLENECK, **changes})
    assert isinstance(strategy, AdapterCL)
    return strategy


def run(folder: Path, stream: Any = None, **changes: Any) -> tuple[Any, Any, Recorder]:
    """With the tiny ViT, or BERT if the stream has texts."""
    strategy, recorder, stream = make(**changes), Recorder(), stream or TinyStream()
    text = isinstance(stream, TinyTextStream)
    options = {} if text else {"backbone": tiny_vit()}
    experiment = (make_text_experiment if text else make_experiment)(
        folder, {"adapters": strategy, "recorder": recorder}, stream=stream, optimizer=ADAMW,
        trainer={"max_epochs": 4}, **options,
    )  # fmt: skip
    experiment.run()
    return experiment.learner.eval(), stream, recorder


def of_experience(state: dict[str, Tensor], experience: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if f".adapters.{experience}." in name}


@pytest.mark.parametrize("stream", [TinyStream, TinyTextStream])
@pytest.mark.parametrize("first", ["full", "adapter"])
def test_earlier_adapters_and_the_backbone_are_untouched(first: str, stream: Any, tmp_path: Path) -> None:
    _, _, recorder = run(tmp_path, stream(), first=first)
    own = [name for name in recorder.before[0] if name.startswith("backbone.model.") and ".adapters." not in name]
    assert len(own) > 10
    n_blocks = 1 if stream is TinyTextStream else 2
    for i in range(3):
        before, after = recorder.before[i], recorder.after[i]
        trains_all = first == "full" and i == 0
        assert any(not torch.equal(before[n], after[n]) for n in own) == trains_all
        new = of_experience(before, i)
        assert len(new) == 4 * n_blocks  # gain, bias, D and U
        changed = {name: not torch.equal(t, after[name]) for name, t in new.items()}
        assert set(changed.values()) == {not trains_all}, changed
        assert not any(t.any() for n, t in new.items() if n.endswith("up.weight"))  # it starts as the backbone itself
        for earlier in range(i):
            kept = of_experience(before, earlier)
            assert len(kept) == 4 * n_blocks
            assert all(torch.equal(t, after[n]) for n, t in kept.items())
        assert torch.equal(before[ROWS][: 2 * i], after[ROWS][: 2 * i])
        assert not (before[ROWS][2 * i :] == after[ROWS][2 * i :]).any()
        assert torch.equal(before["head.linear.weight"], after["head.linear.weight"])  # not used


def mixed(stream: Any) -> dict[str, Tensor]:
    """Test samples of all experiences in one batch, shuffled."""
    batches = [e.test.fetch(torch.arange(len(e.test))) for e in stream]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    return {n: torch.cat([b[n] for b in batches])[order] for n in batches[0]}


def means_by_hand(learner: Any, stream: Any) -> Tensor:
    """Mean of the normalised bare features of each class of each experience, [M, D]."""
    adapter.activate(learner.backbone, None)
    means = []
    for experience in stream:
        batch = experience.train.fetch(torch.arange(len(experience.train)))
        features = F.normalize(learner.backbone(batch), dim=1)
        means += [features[batch["labels"] == k].mean(0) for k in experience.classes]
    return torch.stack(means)


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
        means = means_by_hand(learner, stream)
        torch.testing.assert_close(state["extras.adapters.means"], means)
        bare = learner.backbone(batch)
        expert = torch.stack([F.cosine_similarity(bare, m[None]) for m in means], 1).argmax(1) // 2
        other = {**batch, "task_labels": torch.randint(3, (48,))}
        assert torch.equal(learner(batch).logits, learner(other).logits)  # task ids are not looked at
    assert len(expert.unique()) == 3
    weight, bias = state[ROWS], state[ROWS.replace("weight", "bias")]
    output = learner(batch)
    for i, e in enumerate(expert.tolist()):
        adapter.activate(learner.backbone, e)
        features = learner.backbone({n: t[i : i + 1] for n, t in batch.items()})
        torch.testing.assert_close(output.features[i : i + 1], features, rtol=1e-4, atol=1e-5)
        expected = features @ weight[2 * e : 2 * e + 2].T + bias[2 * e : 2 * e + 2]
        classes = list(stream[e].classes)
        torch.testing.assert_close(output.logits[i : i + 1, classes], expected, rtol=1e-4, atol=1e-4)
        others = [k for k in range(output.logits.shape[1]) if k not in classes]
        assert (output.logits[i, others] == MASKED).all()


@torch.no_grad()
def test_text_batches_of_mixed_experts_equal_one_row_at_a_time(tmp_path: Path) -> None:
    with torch.enable_grad():
        learner, stream, _ = run(tmp_path, TinyTextStream(scenario="task_incremental"))
    batch = {n: torch.cat([e.test.columns[n] for e in stream]) for n in stream[0].test.columns}
    together = learner(batch)
    for i in range(48):
        length = int(batch["attention_mask"][i].sum())
        row = {n: c[i : i + 1, :length] if c.ndim == 2 else c[i : i + 1] for n, c in batch.items()}
        alone = learner(row)
        torch.testing.assert_close(together.logits[i], alone.logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.features[i], alone.features[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_learned_later_does_not_change_how_an_earlier_expert_answers(tmp_path: Path) -> None:
    stream, answers = TinyStream(scenario="task_incremental"), []
    experiment = make_experiment(tmp_path, {"adapters": make()}, stream=stream, optimizer=ADAMW, backbone=tiny_vit())
    batch, record = stream[0].test.fetch(torch.arange(16)), experiment._record

    def spy(experience: Any, times: Any) -> None:
        with torch.no_grad():
            answers.append(experiment.learner.eval()(batch).logits[:, :2])
        record(experience, times)

    experiment._record = spy  # type: ignore[method-assign]
    with torch.enable_grad():
        experiment.run()
    assert len(answers) == 3
    for later in answers[1:]:  # equal but for rounding: the head's matrix product has got wider
        torch.testing.assert_close(later, answers[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_evaluation_between_training_steps_asks_the_bare_backbone(tmp_path: Path) -> None:
    """A training step leaves its adapters active; the nearest mean must not be looked for through them."""
    with torch.enable_grad():
        learner, stream, _ = run(tmp_path, first="adapter")
    batch = mixed(stream)
    expected = learner(batch).logits
    learner.train()(stream[2].train.fetch(torch.arange(8)))
    assert torch.equal(learner.eval()(batch).logits, expected)


@pytest.mark.parametrize("other", ["replay", "ewc", "lwf", "joint", "gpm", "packnet", "o_lora", "lora_experts"])
def test_is_combined_with_nothing_that_needs_one_model(other: str) -> None:
    pair = f"(adapters cannot be combined with {other}|{other} cannot be combined with adapters) .*: [a-z]+"
    with pytest.raises(ValueError, match=pair):
        Chain({other: from_page(other), "adapters": make()})


def test_a_perceptron_has_no_blocks_to_put_adapters_on() -> None:
    config = configuration("backbone=mlp", "strategy=adapters")
    stream = build.build_stream(configuration(*VIT, "strategy=finetuning"), None)
    with pytest.raises(ClplatformError, match="strategy=adapters needs a Transformer"):
        build.check_needs(build.build_strategies(config), stream.info, config)


def test_extra_parameters_are_adapters_classifiers_and_means(tmp_path: Path) -> None:
    learner, _, _ = run(tmp_path)
    per_adapter, per_class = 2 * (2 * 16 + 2 * BOTTLENECK * 16), 16 + 1 + 16  # two blocks; weights, bias and mean
    assert learner.chain.cost() == {"extra_parameters": 3 * per_adapter + 6 * per_class}


def test_a_training_step_is_counted_with_its_adapters_and_its_gradients(tmp_path: Path) -> None:
    experiment = make_experiment(
        tmp_path, {"adapters": make(first="adapter")}, stream=TinyStream(2), optimizer=ADAMW, backbone=tiny_vit()
    )
    experiment.run()
    backbone, shape = experiment.learner.backbone, (1, 1, 12)
    adapter.activate(backbone, None)
    bare = measure(backbone, shape, True)  # nothing is trained
    adapter.activate(backbone, 1)
    step, ask = (measure(backbone, shape, gradients) for gradients in (True, False))
    assert step > 1.5 * ask > 1.5 * bare
    assert experiment.results.cost["flops"] == 2 * 32 * (2 * step + ask)  # two epochs, and one pass for the means
