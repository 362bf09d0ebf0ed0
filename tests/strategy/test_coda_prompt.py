"""CODA-Prompt against a loop over samples and components, written out."""

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
from world import TinyStream, make_experiment, same, tiny_vit

from clplatform.strategy.base import Chain
from clplatform.strategy.coda_prompt import Components, attend, orthonormal
from clplatform.types import ClplatformError

PAGE = {"layers": [1, 2], "components": 2, "length": 3}
KINDS = ("prompts", "keys", "attentions")


def part(kind: str, i: int) -> str:
    return f"extras.coda_prompt.{kind}.{i}"


class Written:
    """P, K, A [2 layers, M, …] of all experiences, of which the last M_t are trained, and the classifiers."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.old: list[list[Tensor]] = [[], [], []]

    def answer(self, x: Tensor) -> Tensor:
        query = read(self.backbone, x)[0].detach()
        prefixes = {}
        for layer in (0, 1):
            total = torch.zeros(2 * 3 * 16)
            for p, k, a in zip(*(self.components(kind, layer) for kind in (0, 1, 2)), strict=True):
                total = total + cosine(query * a, k) * p
            keys, values = total[: 3 * 16].view(3, 16), total[3 * 16 :].view(3, 16)
            prefixes[layer + 1] = keys, values
        return self.weight @ read(self.backbone, x, prefixes=prefixes)[0] + self.bias

    def components(self, kind: int, layer: int) -> list[Tensor]:
        return [row for block in [*self.old[kind], *self.new[kind : kind + 1]] for row in block[layer]]

    def penalty(self) -> Tensor:
        total = torch.zeros(())
        for layer in (0, 1):
            for kind in (0, 1, 2):
                rows = self.components(kind, layer)
                squares = [(a @ b - float(i == j)) ** 2 for i, a in enumerate(rows) for j, b in enumerate(rows)]
                total = total + sum(squares) / len(squares)
        return total

    def train(self, batches: Any, start: dict[str, Tensor], i: int, classes: Any) -> None:
        self.new = leaves(*(start[part(kind, i)] for kind in KINDS))
        self.weight, self.bias = leaves(start["head.linear.weight"], start["head.linear.bias"])
        optimizer = sgd([*self.new, self.weight, self.bias])
        for batch in batches:
            rows = zip(batch["pixel_values"], batch["labels"].tolist(), strict=True)
            losses = [cross_entropy(self.answer(x), y, classes) for x, y in rows]
            optimizer.zero_grad()
            (sum(losses) / len(losses) + 0.1 * self.penalty()).backward()
            optimizer.step()
        for kind in (0, 1, 2):
            self.old[kind].append(self.new[kind].detach())
        self.new = []


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    stream = TinyStream(scenario=scenario)
    experiment, recorder = run(tmp_path, "coda_prompt", stream=stream, **PAGE)
    learner = experiment.learner.eval()
    model = Written(learner.backbone)
    for i, batches in enumerate(recorder.batches):
        assert len(batches) == 8
        model.train(batches, recorder.before[i], i, stream[i].classes)
        after = recorder.after[i]
        close(after["head.linear.weight"], model.weight)
        close(after["head.linear.bias"], model.bias)
        for kind, blocks in zip(KINDS, model.old, strict=True):
            for j in range(i + 1):
                close(after[part(kind, j)], blocks[j])
    batch = mixed(stream)
    with torch.no_grad():
        for x, found in zip(batch["pixel_values"], learner(batch).logits, strict=True):
            close(found, model.answer(x))


def test_what_others_have_learned_is_frozen_to_the_bit(tmp_path: Path) -> None:
    _, recorder = run(tmp_path, "coda_prompt", optimizer=ADAMW, **PAGE)
    check_frozen(recorder, [0, 2, 4])
    for i in range(3):
        before, after = recorder.before[i], recorder.after[i]
        for kind in KINDS:
            assert not (before[part(kind, i)] == after[part(kind, i)]).any()
            for earlier in range(i):
                assert torch.equal(before[part(kind, earlier)], after[part(kind, earlier)])


def test_without_the_penalty_there_is_no_term(tmp_path: Path) -> None:
    found = []
    for strength in (0.1, 0.0):
        experiment, _ = run(tmp_path / str(strength), "coda_prompt", strength=strength, **PAGE)
        found.append(experiment.learner)
    assert set(found[0].last_terms) == {"loss", "task", "coda_prompt_orthonormal"}
    assert set(found[1].last_terms) == {"loss", "task"}
    far = [float(learner.extras["coda_prompt"].far_from_orthonormal().detach()) for learner in found]
    assert far[0] < far[1]


def test_task_ids_are_not_used(tmp_path: Path) -> None:
    stream = TinyStream()
    check_task_ids_are_not_used(run(tmp_path, "coda_prompt", stream=stream, **PAGE)[0].learner, stream)


def test_texts_are_answered_as_one_at_a_time(tmp_path: Path) -> None:
    stream = TinyTextStream()
    check_text_rows(run(tmp_path, "coda_prompt", stream=stream, optimizer=ADAMW)[0].learner, stream)


def test_attention_is_a_cosine() -> None:
    torch.manual_seed(0)
    q, k, a = torch.randn(5, 8), torch.randn(3, 4, 8).requires_grad_(), torch.randn(3, 4, 8).requires_grad_()
    expected = torch.stack(
        [torch.stack([torch.stack([cosine(x * a[n, m], k[n, m]) for m in range(4)]) for n in range(3)]) for x in q]
    )
    torch.testing.assert_close(attend(q, k, a), expected)
    weights = torch.randn(5, 3, 4)
    found = torch.autograd.grad((attend(q, k, a) * weights).sum(), (k, a))
    for mine, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), (k, a)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_new_components_are_orthonormal_and_orthogonal_to_trained_ones() -> None:
    torch.manual_seed(0)
    old = torch.randn(3, 10)
    new = orthonormal(4, old)
    torch.testing.assert_close(new @ new.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(new @ old.T, torch.zeros(4, 3), rtol=0, atol=1e-5)
    for n, rows in ((8, old), (12, old), (12, old[:0])):  # no room for that many
        torch.testing.assert_close(orthonormal(n, rows).norm(dim=1), torch.ones(n))
    assert not torch.equal(orthonormal(4, old), new)  # drawn


def test_components_grow_once_and_keep_the_old_ones() -> None:
    torch.manual_seed(0)
    components = Components(2, 3, 2, 16)
    components.grow(0, torch.device("cpu"))
    first = {n: t.clone() for n, t in components.state_dict().items()}
    state = torch.get_rng_state()
    components.grow(0, torch.device("cpu"))
    assert same(first, components.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    components.grow(1, torch.device("cpu"))
    assert len(components.state_dict()) == 6
    assert all(torch.equal(t, components.state_dict()[n]) for n, t in first.items())
    assert float(components.far_from_orthonormal().detach()) < 1e-8


def test_queries_cost_one_pass(tmp_path: Path) -> None:
    backbone, rows, counts = tiny_vit(), [], []
    strategy: Any = from_page("coda_prompt")
    experiment = make_experiment(tmp_path, {"coda_prompt": strategy}, backbone=backbone)
    backbone.register_forward_hook(lambda m, args, output: rows.append(len(output)))
    chain = experiment.learner.chain
    before, after = chain.before_experience, chain.after_experience
    chain.before_experience = lambda *args: (rows.clear(), before(*args))[1]  # type: ignore[method-assign]
    chain.after_experience = lambda *args: (counts.append(sum(rows)), after(*args))[1]  # type: ignore[method-assign]
    experiment.run()
    assert counts == [3 * 32] * 3
    assert strategy.queries.features.features.numel() == 0


def test_extra_parameters_are_components(tmp_path: Path) -> None:
    learner = run(tmp_path, "coda_prompt", **PAGE)[0].learner
    assert learner.chain.cost() == {"extra_parameters": 3 * 2 * 2 * (2 * 3 + 2) * 16}


def test_layers_must_be_there(tmp_path: Path) -> None:
    strategies = {"coda_prompt": from_page("coda_prompt", layers=[2, 5])}
    with pytest.raises(ClplatformError, match=r"strategy.coda_prompt.layers=\[2, 5\]: the backbone has 2 layers"):
        make_experiment(tmp_path, strategies, backbone=tiny_vit()).run()


@pytest.mark.parametrize("other", ["replay", "icarl", "lwf", "joint", "lora_experts", "l2p", "a_gem"])
def test_is_combined_with_nothing_that_needs_old_rows_or_copies(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Chain({"coda_prompt": from_page("coda_prompt"), other: from_page(other)})
