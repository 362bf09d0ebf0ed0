"""Progressive Prompts against a loop over samples, written out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted import ADAMW, check_frozen, check_text_rows, close, cross_entropy, leaves, livelier, mixed, read, run, sgd
from strategies import from_page
from text_world import TinyTextStream
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, tiny_vit

from clplatform.head.multi import MultiHead
from clplatform.strategy.base import Chain
from clplatform.strategy.progressive_prompts import Prompts
from clplatform.types import ClplatformError

tasks = partial(TinyStream, scenario="task_incremental")
PROMPT, MLP = "extras.progressive_prompts.prompts.{}", "extras.progressive_prompts.mlp.{}"


class Written:
    """The prompt of each task, and the classifiers of all classes so far."""

    def __init__(self, backbone: Any) -> None:
        self.backbone, self.prompts = backbone, []

    def answer(self, x: Tensor, prompts: list[Tensor]) -> Tensor:
        # Where a prompt is among the others makes no difference to a Transformer without positions.
        return self.weight @ read(self.backbone, x, torch.cat(prompts))[0] + self.bias

    def train(self, batches: Any, start: dict[str, Tensor], i: int, *, hidden: bool) -> None:
        (theta,) = leaves(start[PROMPT.format(i)])
        names = [f"{n}.{kind}" for n in (0, 2, 3) for kind in ("weight", "bias")] if hidden else []
        mlp = leaves(*(start[MLP.format(name)] for name in names))
        self.weight, self.bias = leaves(start["head.linear.weight"], start["head.linear.bias"])
        optimizer = sgd([theta, *mlp, self.weight, self.bias])

        def prompt() -> Tensor:
            if not hidden:
                return theta
            z = (theta @ mlp[0].T + mlp[1]).clamp_min(0) @ mlp[2].T + mlp[3]
            return theta + F.layer_norm(z, (16,), mlp[4], mlp[5])

        for batch in batches:
            losses = []
            for x, y in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
                losses.append(cross_entropy(self.answer(x, [*self.prompts, prompt()]), y, (2 * i, 2 * i + 1)))
            optimizer.zero_grad()
            (sum(losses) / len(losses)).backward()
            optimizer.step()
        self.prompts.append(prompt().detach())


@pytest.mark.parametrize("hidden", [None, 8])
def test_equals_a_hand_written_loop(hidden: int | None, tmp_path: Path) -> None:
    """Training, and then rows of different tasks in one batch."""
    stream = tasks()
    experiment, recorder = run(tmp_path, "progressive_prompts", stream=stream, hidden=hidden)
    learner = experiment.learner.eval()
    model = Written(learner.backbone)
    for i, batches in enumerate(recorder.batches):
        assert len(batches) == 8
        model.train(batches, recorder.before[i], i, hidden=hidden is not None)
        assert (MLP.format("0.weight") in recorder.before[i]) == (hidden is not None)
    for i in range(3):
        found = learner.extras["progressive_prompts"].prompts[i].detach()
        close(found, model.prompts[i])
    close(learner.head.linear.weight.detach(), model.weight)
    close(learner.head.linear.bias.detach(), model.bias)
    batch = mixed(stream)
    with torch.no_grad():
        logits = learner(batch).logits
        for x, task, found in zip(batch["pixel_values"], batch["task_labels"].tolist(), logits, strict=True):
            own = slice(2 * task, 2 * task + 2)
            close(found[own], model.answer(x, model.prompts[: task + 1])[own])


@pytest.mark.parametrize("hidden", [None, 8])
def test_earlier_prompts_backbone_and_classifiers_are_frozen_to_the_bit(hidden: int | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"stream": tasks(), "hidden": hidden, "optimizer": ADAMW}
    _, recorder = run(tmp_path, "progressive_prompts", **options)
    check_frozen(recorder, [0, 2, 4])
    for i in range(3):
        before, after = recorder.before[i], recorder.after[i]
        assert not (before[PROMPT.format(i)] == after[PROMPT.format(i)]).any()
        for earlier in range(i):
            assert torch.equal(before[PROMPT.format(earlier)], after[PROMPT.format(earlier)])


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_task_is_answered_as_on_the_day_it_was_learned(hidden: int | None, tmp_path: Path) -> None:
    stream, answers = tasks(), []
    strategies = {"progressive_prompts": from_page("progressive_prompts", hidden=hidden)}
    experiment = make_experiment(tmp_path, strategies, stream=stream, backbone=livelier(tiny_vit()), optimizer=ADAMW)
    batch, record = stream[0].test.fetch(torch.arange(16)), experiment._record

    def spy(experience: Any, times: Any) -> None:
        with torch.no_grad():
            answers.append(experiment.learner.eval()(batch))
        record(experience, times)

    experiment._record = spy  # type: ignore[method-assign]
    experiment.run()
    for later in answers[1:]:
        assert torch.equal(later.features, answers[0].features)
        torch.testing.assert_close(later.logits[:, :2], answers[0].logits, rtol=0, atol=1e-5)  # the product is wider
    first = [row[0] for row in experiment.results.matrix[1:]]
    assert first == [first[0]] * 3


def test_a_head_for_each_task(tmp_path: Path) -> None:
    stream = tasks()
    strategies = {"progressive_prompts": from_page("progressive_prompts")}
    options: dict[str, Any] = {"backbone": livelier(tiny_vit()), "optimizer": ADAMW, "trainer": {"max_epochs": 8}}
    experiment = make_experiment(tmp_path, strategies, stream=stream, **options)
    experiment.learner.make_head = lambda: MultiHead(feature_size=16)
    experiment.learner.head = experiment.learner.make_head()
    experiment.run()
    first = [row[0] for row in experiment.results.matrix[1:]]
    assert first == [first[0]] * 3
    assert all(experiment.results.matrix[i + 1][i] > 0.7 for i in range(3))  # type: ignore[operator]


def test_texts_are_answered_as_one_at_a_time(tmp_path: Path) -> None:
    stream = TinyTextStream(scenario="task_incremental")
    check_text_rows(run(tmp_path, "progressive_prompts", stream=stream, optimizer=ADAMW)[0].learner, stream)


def test_the_mlp_is_gone_when_a_task_is_learned() -> None:
    """What it makes of the prompt is the prompt, to the bit, and is so however often the experience ends."""
    torch.manual_seed(0)
    prompts = Prompts(3, 16, 8)
    prompts.grow(0, torch.device("cpu"))
    state = torch.get_rng_state()
    prompts.grow(0, torch.device("cpu"))
    assert torch.equal(state, torch.get_rng_state())
    start, learned = prompts.prompts[0].detach().clone(), prompts.latest().detach()
    assert not torch.allclose(start, learned, atol=0.1)
    for _ in range(2):
        prompts.settle()
        assert torch.equal(prompts.prompts[0], learned)
        assert torch.equal(prompts.latest(), learned)
    prompts.grow(1, torch.device("cpu"))
    assert torch.equal(prompts.up_to(0), learned)
    assert torch.equal(prompts.up_to(1)[3:], learned)
    assert not torch.allclose(prompts.latest(), prompts.prompts[1], atol=0.1)  # a new MLP for the new task


def test_a_task_that_comes_back_is_refused(tmp_path: Path) -> None:
    stream = tasks()
    stream.experiences[2] = replace(stream[2], task_label=0)
    strategies = {"progressive_prompts": from_page("progressive_prompts")}
    with pytest.raises(ClplatformError, match="in the experience 'e3' task 0 comes back"):
        make_experiment(tmp_path, strategies, stream=stream, backbone=tiny_vit()).run()


def test_extra_parameters_are_prompts_and_the_mlp(tmp_path: Path) -> None:
    learner = run(tmp_path, "progressive_prompts", stream=tasks())[0].learner
    assert learner.chain.cost() == {"extra_parameters": 3 * 3 * 16 + (16 + 1) * 8 + (8 + 1) * 16 + 2 * 16}


@pytest.mark.parametrize("other", ["replay", "icarl", "lwf", "joint", "lora_experts", "l2p", "packnet"])
def test_is_combined_with_nothing_that_needs_old_rows_or_copies(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Chain({"progressive_prompts": from_page("progressive_prompts"), other: from_page(other)})
