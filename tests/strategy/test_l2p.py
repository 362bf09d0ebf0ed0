"""L2P against a loop over samples, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prompted import (
    ADAMW,
    check_frozen,
    check_task_ids_are_not_used,
    check_text_rows,
    close,
    cosine,
    cross_entropy,
    leaves,
    mixed,
    read,
    run,
    sgd,
)
from strategies import from_page
from text_world import TinyTextStream
from torch import Tensor
from world import TinyStream, make_experiment, tiny_vit, weights

from clplatform.strategy.base import Chain
from clplatform.strategy.l2p import L2P
from clplatform.types import ClplatformError

PAPER = {"features": "prompts", "mask": True}


class Written:
    """Prompts [M, L, D], keys [M, D], and the classifiers of all classes so far."""

    def __init__(self, backbone: Any, start: dict[str, Tensor], *, features: str, mask: bool, diversify: bool) -> None:
        self.backbone, self.features, self.mask, self.diversify = backbone, features, mask, diversify
        self.prompts, self.keys = leaves(start["extras.l2p.prompts"], start["extras.l2p.keys"])
        self.usage = [0] * 6

    def choose(self, query: Tensor, weights: list[float]) -> list[int]:
        distance = [float(1 - cosine(query, key.detach())) * w for key, w in zip(self.keys, weights, strict=True)]
        return sorted(range(6), key=lambda m: distance[m])[:2]

    def answer(self, x: Tensor, chosen: list[int]) -> Tensor:
        outputs = read(self.backbone, x, torch.cat([self.prompts[m] for m in chosen]))
        features = outputs[1:5].mean(0) if self.features == "prompts" else outputs[0]
        return self.weight @ features + self.bias

    def train(self, batches: Any, start: dict[str, Tensor], classes: tuple[int, ...]) -> None:
        self.weight, self.bias = leaves(start["head.linear.weight"], start["head.linear.bias"])
        self.prompts, self.keys = leaves(self.prompts, self.keys)
        optimizer = sgd([self.prompts, self.keys, self.weight, self.bias])
        h = [1.0] * 6
        if self.diversify and any(self.usage):
            h = [n / sum(self.usage) for n in self.usage]
        for batch in batches:
            loss = torch.zeros(())
            for x, y in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
                query = read(self.backbone, x)[0].detach()
                chosen = self.choose(query, h)
                for m in chosen:
                    self.usage[m] += 1
                    loss = loss + 0.5 * (1 - cosine(query, self.keys[m]))
                logits = self.answer(x, chosen)
                loss = loss + cross_entropy(logits, y, classes if self.mask else range(len(logits)))
            optimizer.zero_grad()
            (loss / len(batch["labels"])).backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("changes", "diversify"),
    [(PAPER, False), (PAPER, True), ({"features": "backbone", "mask": True}, False), ({"features": "prompts", "mask": False}, False)],
    ids=["paper", "diversified", "class token", "all classes"],
)  # fmt: skip
def test_equals_a_hand_written_loop(changes: dict[str, Any], diversify: bool, tmp_path: Path) -> None:
    stream = TinyStream()
    experiment, recorder = run(tmp_path, "l2p", stream=stream, diversify=diversify, **changes)
    learner = experiment.learner.eval()
    model = Written(learner.backbone, recorder.before[0], diversify=diversify, **changes)
    for i, batches in enumerate(recorder.batches):
        assert len(batches) == 8
        model.train(batches, recorder.before[i], stream[i].classes)
        after = recorder.after[i]
        close(after["extras.l2p.prompts"], model.prompts)
        close(after["extras.l2p.keys"], model.keys)
        close(after["head.linear.weight"], model.weight)
        close(after["head.linear.bias"], model.bias)
        assert after["extras.l2p.usage"].tolist() == model.usage
    assert sum(model.usage) == 3 * 2 * 32 * 2
    assert sum(n > 0 for n in model.usage) > 2
    batch = mixed(stream)
    with torch.no_grad():
        logits = learner(batch).logits
        for x, found in zip(batch["pixel_values"], logits, strict=True):  # at inference nothing is diversified
            close(found, model.answer(x, model.choose(read(model.backbone, x)[0], [1.0] * 6)))


def test_diversity_changes_what_is_chosen(tmp_path: Path) -> None:
    usage = [
        run(tmp_path / str(d), "l2p", diversify=d, **PAPER)[1].after[-1]["extras.l2p.usage"] for d in (False, True)
    ]
    assert (usage[1] > 0).sum() > (usage[0] > 0).sum()


def test_the_backbone_and_old_classifiers_are_frozen_to_the_bit(tmp_path: Path) -> None:
    _, recorder = run(tmp_path, "l2p", optimizer=ADAMW, **PAPER)
    check_frozen(recorder, [0, 2, 4])
    for i in range(3):  # prompts that were not chosen, and their keys
        before, after = recorder.before[i], recorder.after[i]
        never = before["extras.l2p.usage"] == after["extras.l2p.usage"]
        for name in ("extras.l2p.prompts", "extras.l2p.keys"):
            same = (before[name] == after[name]).flatten(1)
            assert torch.equal(same.all(1), never)
            assert torch.equal(same.any(1), never)


def test_task_ids_are_not_used(tmp_path: Path) -> None:
    stream = TinyStream()
    check_task_ids_are_not_used(run(tmp_path, "l2p", stream=stream, **PAPER)[0].learner, stream)


def test_texts_are_answered_as_one_at_a_time(tmp_path: Path) -> None:
    stream = TinyTextStream()
    check_text_rows(run(tmp_path, "l2p", stream=stream, optimizer=ADAMW, **PAPER)[0].learner, stream)


@pytest.mark.parametrize("augmented", [False, True])
def test_queries_cost_one_pass_unless_samples_are_augmented(augmented: bool, tmp_path: Path) -> None:
    backbone, rows = tiny_vit(), []
    options: dict[str, Any] = {"augment": lambda batch, generator: dict(batch)} if augmented else {}
    experiment = make_experiment(tmp_path, {"l2p": from_page("l2p")}, backbone=backbone, **options)
    backbone.register_forward_hook(lambda m, args, output: rows.append(len(output)))
    chain = experiment.learner.chain
    before, after = chain.before_experience, chain.after_experience
    counts: list[int] = []
    chain.before_experience = lambda *args: (rows.clear(), before(*args))[1]  # type: ignore[method-assign]
    chain.after_experience = lambda *args: (counts.append(sum(rows)), after(*args))[1]  # type: ignore[method-assign]
    experiment.run()
    assert counts == [2 * 32 + (2 * 32 if augmented else 32)] * 3


def test_usage_is_logged(tmp_path: Path) -> None:
    strategy = from_page("l2p")
    experiment = make_experiment(tmp_path, {"l2p": strategy}, backbone=tiny_vit())
    shares: list[float] = []
    experiment.fitter.after_batch = lambda *args: shares.append(float(experiment.learner.last_terms["l2p_chosen"]))
    experiment.run()
    assert len(shares) == 24
    assert all(2 / 6 - 1e-6 <= s <= 1 for s in shares)
    for epochs in (shares[:8], shares[8:16], shares[16:]):  # since the experience began
        assert epochs == sorted(epochs)
    usage = experiment.learner.extras["l2p"].usage
    assert usage.sum() == 3 * 64 * 2
    assert isinstance(strategy, L2P)
    assert strategy.chosen is strategy.before is None
    assert strategy.queries.features.features.numel() == 0


@torch.no_grad()
def test_an_evaluation_counts_and_changes_nothing_and_is_not_diversified(tmp_path: Path) -> None:
    """Within an experience (validation) as after it."""
    stream = TinyStream()
    with torch.enable_grad():
        learner = run(tmp_path, "l2p", stream=stream, diversify=True)[0].learner.eval()
    before, answers = weights(learner), learner(mixed(stream)).logits
    learner.chain.before_experience(learner, stream[2])
    assert torch.equal(learner(mixed(stream)).logits, answers)
    assert all(torch.equal(t, before[n]) for n, t in weights(learner).items())


def test_extra_parameters_are_prompts_and_keys(tmp_path: Path) -> None:
    assert run(tmp_path, "l2p")[0].learner.chain.cost() == {"extra_parameters": 6 * (2 + 1) * 16}


def test_a_pool_must_have_as_many_prompts_as_are_chosen() -> None:
    with pytest.raises(ValueError, match="choose=7 is more than the 6 prompts"):
        from_page("l2p", choose=7)


def test_a_perceptron_is_refused(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, {"l2p": from_page("l2p")})
    with pytest.raises(ClplatformError, match="strategy=l2p cannot give soft prompts"):
        experiment.run()


@pytest.mark.parametrize("other", ["replay", "icarl", "lwf", "joint", "lora_experts", "dualprompt", "a_gem"])
def test_is_combined_with_nothing_that_needs_old_rows_or_copies(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Chain({"l2p": from_page("l2p"), other: from_page(other)})


@pytest.mark.parametrize(("other", "changes"), [("ewc", {}), ("si", {}), ("ranpac", {"first_session": True})])
def test_runs_together_with_others(other: str, changes: dict[str, Any], tmp_path: Path) -> None:
    strategies = {"l2p": from_page("l2p"), other: from_page(other, **changes)}
    experiment = make_experiment(tmp_path, strategies, backbone=tiny_vit())
    experiment.run()
    assert experiment.results.status == "completed"
    assert experiment.learner.extras["l2p"].usage.sum() == (64 * 2 if other == "ranpac" else 3 * 64 * 2)
