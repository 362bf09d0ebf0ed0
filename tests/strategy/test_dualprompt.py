"""DualPrompt against a loop over samples, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Recorder
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
from world import TinyStream, make_experiment, tiny_vit

from clplatform.strategy.base import Chain
from clplatform.strategy.dualprompt import DualPrompt
from clplatform.types import ClplatformError

PAGE = {"mask": True, "g_layers": [1], "e_layers": [2, 1]}
G, E, KEY = "extras.dualprompt.shared", "extras.dualprompt.own.{}", "extras.dualprompt.keys.{}"


class Written:
    """G [1 layer, 2, 2, D], E of each experience [2 layers, 2, 3, D], keys [D], and the classifiers."""

    def __init__(self, backbone: Any, start: dict[str, Tensor]) -> None:
        self.backbone, self.g, self.own, self.keys = backbone, start[G], [], []

    def answer(self, x: Tensor, own: Tensor) -> Tensor:
        """G in front of the first layer's keys and values, E in front of the second's and of G."""
        first = tuple(torch.cat([own[1, kind], self.g[0, kind]]) for kind in (0, 1))
        outputs = read(self.backbone, x, prefixes={1: first, 2: (own[0, 0], own[0, 1])})  # type: ignore[dict-item]
        return self.weight @ outputs[0] + self.bias

    def query(self, x: Tensor) -> Tensor:
        return read(self.backbone, x)[0].detach()

    def train(self, batches: Any, start: dict[str, Tensor], i: int, classes: Any, *, keys: bool = True) -> None:
        own, key = leaves(start[E.format(i)], start[KEY.format(i)])
        self.weight, self.bias = leaves(start["head.linear.weight"], start["head.linear.bias"])
        (self.g,) = leaves(self.g)
        optimizer = sgd([self.g, own, key, self.weight, self.bias])
        for batch in batches:
            loss = torch.zeros(())
            for x, y in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
                loss = loss + cross_entropy(self.answer(x, own), y, classes)
                if keys:
                    loss = loss + 1 - cosine(self.query(x), key)
            optimizer.zero_grad()
            (loss / len(batch["labels"])).backward()
            optimizer.step()
        self.own.append(own.detach())
        self.keys.append(key.detach())


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    """Training, and then which prefixes each row of a mixed batch gets: by task id where it is known, else by key."""
    stream, known = TinyStream(scenario=scenario), scenario == "task_incremental"
    experiment, recorder = run(tmp_path, "dualprompt", stream=stream, **PAGE)
    learner = experiment.learner.eval()
    model = Written(learner.backbone, recorder.before[0])
    for i, batches in enumerate(recorder.batches):
        assert len(batches) == 8
        model.train(batches, recorder.before[i], i, stream[i].classes, keys=not known)
        after = recorder.after[i]
        close(after[G], model.g)
        close(after["head.linear.weight"], model.weight)
        close(after["head.linear.bias"], model.bias)
        for j in range(i + 1):
            close(after[E.format(j)], model.own[j])
            close(after[KEY.format(j)], model.keys[j])
    batch, asked = mixed(stream), set()
    with torch.no_grad():
        logits = learner(batch).logits
        for x, task, found in zip(batch["pixel_values"], batch["task_labels"].tolist(), logits, strict=True):
            similarity = [float(cosine(model.query(x), key)) for key in model.keys]
            chosen = task if known else similarity.index(max(similarity))
            asked.add(chosen)
            expected = model.answer(x, model.own[chosen])
            columns = list(stream[task].classes) if known else list(range(len(expected)))
            close(found[columns], expected[columns])
    assert len(asked) == (3 if known else 2)


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
def test_what_others_have_learned_is_frozen_to_the_bit(scenario: str, tmp_path: Path) -> None:
    _, recorder = run(tmp_path, "dualprompt", stream=TinyStream(scenario=scenario), optimizer=ADAMW, **PAGE)
    check_frozen(recorder, [0, 2, 4])
    for i in range(3):
        before, after = recorder.before[i], recorder.after[i]
        for pattern in (E, KEY):
            changes = pattern is E or scenario == "class_incremental"  # where task ids are known nobody asks for keys
            assert torch.equal(before[pattern.format(i)], after[pattern.format(i)]) != changes
            for earlier in range(i):
                assert torch.equal(before[pattern.format(earlier)], after[pattern.format(earlier)])
        assert not (before[G] == after[G]).any()


def test_what_is_frozen_is_out_of_reach_of_other_strategies_terms(tmp_path: Path) -> None:
    """L2-init pulls at everything that is trained, at every step."""
    recorder = Recorder()
    strategies = {
        "recorder": recorder,
        "dualprompt": from_page("dualprompt"),
        "l2_init": from_page("l2_init", strength=0.1),
    }
    make_experiment(tmp_path, strategies, backbone=tiny_vit()).run()
    for pattern in (E, KEY):
        assert torch.equal(recorder.after[0][pattern.format(0)], recorder.after[2][pattern.format(0)])
        assert not torch.equal(recorder.before[2][pattern.format(2)], recorder.after[2][pattern.format(2)])


def test_task_ids_are_not_used_where_they_are_hidden(tmp_path: Path) -> None:
    stream = TinyStream()
    check_task_ids_are_not_used(run(tmp_path, "dualprompt", stream=stream, **PAGE)[0].learner, stream)


def test_texts_are_answered_as_one_at_a_time(tmp_path: Path) -> None:
    stream = TinyTextStream()
    learner = run(tmp_path, "dualprompt", stream=stream, optimizer=ADAMW, mask=True)[0].learner
    check_text_rows(learner, stream)


@pytest.mark.parametrize(("scenario", "queries"), [("class_incremental", 32), ("task_incremental", 0)])
def test_queries_cost_one_pass_and_none_where_task_ids_are_known(scenario: str, queries: int, tmp_path: Path) -> None:
    backbone, rows, counts = tiny_vit(), [], []
    strategy, stream = from_page("dualprompt"), TinyStream(scenario=scenario)
    experiment = make_experiment(tmp_path, {"dualprompt": strategy}, backbone=backbone, stream=stream)
    backbone.register_forward_hook(lambda m, args, output: rows.append(len(output)))
    chain = experiment.learner.chain
    before, after = chain.before_experience, chain.after_experience
    chain.before_experience = lambda *args: (rows.clear(), before(*args))[1]  # type: ignore[method-assign]
    chain.after_experience = lambda *args: (counts.append(sum(rows)), after(*args))[1]  # type: ignore[method-assign]
    experiment.run()
    assert counts == [2 * 32 + queries] * 3
    assert isinstance(strategy, DualPrompt)
    assert strategy.similarity is None
    assert strategy.queries.features.features.numel() == 0


def test_extra_parameters_are_prefixes_and_keys(tmp_path: Path) -> None:
    learner = run(tmp_path, "dualprompt", **PAGE)[0].learner
    assert learner.chain.cost() == {"extra_parameters": 2 * 2 * 16 + 3 * (2 * 2 * 3 * 16 + 16)}


@pytest.mark.parametrize("changes", [{"g_layers": [1, 3]}, {"e_layers": [3]}])
def test_layers_must_be_there(changes: dict[str, Any], tmp_path: Path) -> None:
    setting, layers = next(iter(changes.items()))
    experiment = make_experiment(tmp_path, {"dualprompt": from_page("dualprompt", **changes)}, backbone=tiny_vit())
    with pytest.raises(ClplatformError) as error:
        experiment.run()
    assert f"strategy.dualprompt.{setting}={layers}: the backbone has 2 layers" in str(error.value)


@pytest.mark.parametrize("other", ["replay", "icarl", "lwf", "joint", "lora_experts", "l2p", "a_gem"])
def test_is_combined_with_nothing_that_needs_old_rows_or_copies(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Chain({"dualprompt": from_page("dualprompt"), other: from_page(other)})
