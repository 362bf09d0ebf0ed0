"""All tunings: what is trained and what stays to the bit, copies, importances, resuming."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import from_page as strategy
from tuned import MARKS, NAMES, encoder, shake, tiny_experiment, trained_names
from world import same, weights

from clplatform.regularization.per_sample import mean_over_data
from clplatform.results import Results
from clplatform.schedule import schedule

# Decay and momentum reach parameters that have no gradient, if they are in the optimizer at all.
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
KINDS = ["vit", "bert"]
EXACT_AT_THE_START = ["adapter", "bitfit", "dora", "ia3", "lora"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_under_replay_ewc_and_lwf_the_tuning_is_trained_and_the_rest_stays_to_the_bit(
    name: str, kind: str, tmp_path: Path
) -> None:
    strategies = {n: strategy(n) for n in ("replay", "ewc", "lwf")}
    experiment = tiny_experiment(tmp_path, kind, name, strategies, optimizer=ADAMW)
    learner = experiment.learner
    trained = {f"backbone.{n}" for n in trained_names(learner.backbone)}
    named = [f"backbone.{n}" for n, _ in learner.backbone.named_parameters()]
    assert trained == {n for n in named if MARKS[name] in n}
    before = weights(learner)
    experiment.run()
    after = weights(learner)
    changed = {n for n in before if n.startswith("backbone.") and not torch.equal(before[n], after[n])}
    # (A bias of keys does not change what is attended to.)
    assert changed <= trained
    assert trained - changed <= {n for n in trained if n.endswith(("key.bias", "k_proj.bias"))}
    assert set(learner.chain.strategies["ewc"].quadratic.weight) <= trained | {
        n for n in after if n.startswith("head.")
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "bert", "distilbert"])
@pytest.mark.parametrize("name", EXACT_AT_THE_START)
def test_changes_nothing_at_the_start(name: str, kind: str) -> None:
    bare, batch = encoder(kind)
    tuned, _ = encoder(kind, name)
    assert torch.equal(tuned(batch), bare(batch))
    shake(tuned)
    assert not torch.allclose(tuned(batch), bare(batch), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_tuned_by_what_is_its_own(name: str, kind: str) -> None:
    """As teachers are: what the original learns later must not reach them, nor the other way round."""
    backbone, batch = encoder(kind, name)
    before = backbone(batch)
    copied = copy.deepcopy(backbone)
    shake(backbone)
    assert torch.equal(copied(batch), before)
    assert not torch.equal(backbone(batch), before)
    shake(copied)
    assert torch.equal(copied(batch), backbone(batch))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_rows_and_is_the_same_again_from_the_state(name: str, kind: str) -> None:
    backbone, batch = encoder(kind, name)
    shake(backbone)
    together = backbone(batch)
    for i in range(5):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        if kind == "bert":  # without its padding
            length = int(row["attention_mask"].sum())
            row = {key: value[:, :length] for key, value in row.items()}
        torch.testing.assert_close(backbone(row)[0], together[i], rtol=1e-4, atol=1e-5)
    again, _ = encoder(kind, name)
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again(batch), together)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_single_samples_are_right(name: str, tmp_path: Path) -> None:
    """What importances are made of: vectorised (which Hugging Face's text models do not allow), and one sample at a time."""
    experiment = tiny_experiment(tmp_path, "vit", name, {"finetuning": strategy("finetuning")})
    learner, data = experiment.learner, experiment.stream[0].train.select(torch.arange(6))
    learner.build(experiment.stream[0].info)
    shake(learner.backbone)

    def loss(output: Any, batch: Any) -> Any:
        return learner.task_loss(batch, output)

    found = mean_over_data(learner, data, loss, torch.square)
    assert not getattr(learner, "vmap_failed", False)  # it is vectorised
    learner.vmap_failed = learner.linear_failed = True
    naive = mean_over_data(learner, data, loss, torch.square)
    assert found.keys() == naive.keys()
    assert any(n.startswith("backbone.") for n in found)
    for n in found:
        torch.testing.assert_close(found[n], naive[n], rtol=1e-3, atol=1e-8)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("name", "kind"), [*((n, "vit") for n in NAMES), ("prompt", "bert"), ("lora", "bert")])
def test_resumes_to_the_same_bits(name: str, kind: str, tmp_path: Path) -> None:
    def make(folder: str) -> Any:
        strategies = {n: strategy(n) for n in ("replay", "lwf")}
        options: Any = {"fitter": {"checkpoint_every": 3}, "optimizer": ADAMW}
        options["schedule"] = partial(schedule, kind="linear", warmup=0.2)
        return tiny_experiment(tmp_path / folder, kind, name, strategies, **options)

    whole = make("whole")
    whole.run()
    broken, count = make("broken"), 0

    def kill(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 13:  # in the second experience: 4 batches with rows of the memory, 2 epochs
            raise Killed

    broken.fitter.after_batch = kill
    with pytest.raises(Killed):
        broken.run()
    again = make("broken")
    shake(again.learner.backbone)  # whatever it starts with
    again.results = Results.load(tmp_path / "broken")
    again.run(resume=True)
    frozen = {n for n, p in whole.learner.named_parameters() if not p.requires_grad}
    assert frozen
    assert same(weights(whole.learner), weights(again.learner))
    assert whole.results.matrix == again.results.matrix


@pytest.mark.parametrize("name", NAMES)
def test_scales_and_biases_do_not_decay(name: str, tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, "vit", name, {"finetuning": strategy("finetuning")}, optimizer=ADAMW)
    learner = experiment.learner
    learner.build(experiment.stream[0].info)
    names = {id(p): n for n, p in learner.named_parameters()}
    for group in learner.make_optimizer().param_groups:
        for p in group["params"]:
            vector = names[id(p)].endswith("bias") or any(s in names[id(p)] for s in ("ia3_l", "magnitude", "norm"))
            assert (group["weight_decay"] == 0) == vector, names[id(p)]
