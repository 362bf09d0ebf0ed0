"""Independent models: each is what a model trained on its experience alone is, and none is touched again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import GROWING
from naive import Model, run, train
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, same, weights

from clplatform.head.multi import MultiHead
from clplatform.strategy.base import Chain
from clplatform.strategy.independent import Independent
from clplatform.types import MASKED, Batch

BACKBONE = ("backbone.layer.weight", "backbone.layer.bias")


def stream_of_tasks() -> TinyStream:
    return TinyStream(scenario="task_incremental", noise=1.0)


def mixed(stream: Any) -> Batch:
    """Test samples of all tasks in one batch, shuffled."""
    batches = [e.test.fetch(torch.arange(len(e.test))) for e in stream]
    order = torch.randperm(sum(len(b["labels"]) for b in batches), generator=torch.Generator().manual_seed(0))
    return {n: torch.cat([b[n] for b in batches])[order] for n in batches[0]}


def task_loss(first: int) -> Any:
    """Cross-entropy over the task's own classes, written out."""

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, first : first + 2], batch["labels"] - first)

    return loss


def test_each_is_a_fresh_model_trained_on_its_experience(tmp_path: Path) -> None:
    """Mixed batches too: every sample is answered by its own task's model, among its own task's classes."""
    stream = stream_of_tasks()
    experiment, recorder = run(tmp_path, "independent", Independent(), stream=stream, last=True)
    batch, models = mixed(stream), []
    initial = weights(make_experiment(tmp_path / "b", {"independent": Independent()}, stream=stream).learner)
    for i, (start, batches) in enumerate(zip(recorder.before, recorder.batches, strict=True)):
        assert all(torch.equal(start[name], initial[name]) for name in BACKBONE)
        if i:
            old = recorder.after[i - 1]["head.linear.weight"]
            assert not (start["head.linear.weight"][: len(old)] == old).any()  # drawn anew
        model = Model(start)
        train(model, batches, task_loss(2 * i))
        models.append(model)
    with torch.no_grad():
        logits = experiment.learner.eval()(batch).logits
        for row, x, task in zip(logits, batch["pixel_values"], batch["task_labels"].tolist(), strict=True):
            expected = models[task](x[None])[0, 2 * task : 2 * task + 2]
            torch.testing.assert_close(row[2 * task : 2 * task + 2], expected, rtol=1e-4, atol=1e-5)
            others = [k for k in range(6) if k // 2 != task]
            assert (row[others] == MASKED).all()
    assert torch.equal(logits.argmax(1) // 2, batch["task_labels"])


def test_earlier_answers_stay_to_the_bit(tmp_path: Path) -> None:
    stream, answers = stream_of_tasks(), []
    experiment = make_experiment(tmp_path, {"independent": Independent()}, stream=stream, dropout=0.3)
    batch, record = stream[0].test.fetch(torch.arange(16)), experiment._record

    def spy(experience: Any, times: Any) -> None:
        with torch.no_grad():
            answers.append(experiment.learner.eval()(batch).logits[:, :2])
        record(experience, times)

    experiment._record = spy  # type: ignore[method-assign]
    experiment.run()
    assert len(answers) == 3
    for later in answers[1:]:  # equal but for rounding: the matrix product has got wider
        torch.testing.assert_close(later, answers[0], rtol=0, atol=1e-6)
    column = [row[0] for row in experiment.results.matrix[1:]]
    assert column == [column[0]] * 3


def test_a_task_that_comes_back_is_answered_by_its_latest_model(tmp_path: Path) -> None:
    stream = stream_of_tasks()
    again = replace(stream.experiences[0], index=2, n_seen_classes=4, train=stream.experiences[0].train)
    stream.experiences[2] = again
    experiment, recorder = run(tmp_path, "independent", Independent(), stream=stream, last=True)
    batch = stream[0].test.fetch(torch.arange(16))
    model = Model(recorder.before[2])
    train(model, recorder.batches[2], task_loss(0))
    with torch.no_grad():
        logits = experiment.learner.eval()(batch).logits
        torch.testing.assert_close(logits[:, :2], model(batch["pixel_values"])[:, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["multi", "cosine"])
def test_other_heads_are_kept_too(head: str, tmp_path: Path) -> None:
    stream = stream_of_tasks()
    experiment = make_experiment(tmp_path, {"independent": Independent()}, stream=stream)
    learner = experiment.learner
    learner.make_head = (lambda: MultiHead(feature_size=16)) if head == "multi" else (lambda: GROWING["cosine"](16))
    learner.head = learner.make_head()
    experiment.run()
    assert all(value is not None and value > 0.8 for value in experiment.results.matrix[-1])
    copy = make_experiment(tmp_path / "b", {"independent": Independent()}, stream=stream).learner
    copy.make_head, copy.head = learner.make_head, learner.make_head()
    for e in stream:
        copy.build(e.info)
    copy.load_state_dict(learner.state_dict())
    with torch.no_grad():
        assert torch.equal(copy.eval()(mixed(stream)).logits, learner.eval()(mixed(stream)).logits)


def test_texts_of_mixed_tasks_equal_one_task_at_a_time(tmp_path: Path) -> None:
    stream = TinyTextStream(scenario="task_incremental")
    experiment = make_text_experiment(tmp_path, {"independent": Independent()}, stream=stream)
    experiment.run()
    batch = {n: torch.cat([e.test.columns[n] for e in stream]) for n in stream[0].test.columns}
    learner = experiment.learner.eval()
    with torch.no_grad():
        together = learner(batch).logits
        for task in range(3):
            own = batch["task_labels"] == task
            alone = learner({n: column[own] for n, column in batch.items()}).logits
            torch.testing.assert_close(together[own], alone)


def test_structure_is_idempotent_and_its_cost_is_counted(tmp_path: Path) -> None:
    stream, strategy = stream_of_tasks(), Independent()
    learner = make_experiment(tmp_path, {"independent": strategy}, stream=stream).learner
    per_backbone = 12 * 16 + 16
    for i, e in enumerate(stream):
        learner.build(e.info)
        learner.build(e.info)
        assert len(learner.extras["independent"]) == i
        heads = sum(17 * 2 * (j + 2) for j in range(i))  # each as of the experience that follows
        assert strategy.cost() == {"extra_parameters": per_backbone * (i + 1) + heads}
    trainable = {n for n, p in learner.named_parameters() if p.requires_grad}
    assert trainable == {*BACKBONE, "head.linear.weight", "head.linear.bias"}


def test_nothing_is_shared_between_runs(tmp_path: Path) -> None:
    a, b = ({"independent": from_page("independent")} for _ in range(2))
    first = make_experiment(tmp_path / "a", a, stream=stream_of_tasks())
    second = make_experiment(tmp_path / "b", b, stream=stream_of_tasks())
    first.run()
    second.run()
    assert same(weights(first.learner), weights(second.learner))


@pytest.mark.parametrize("other", ["replay", "ewc", "lwf", "joint", "finetuning", "lora_experts", "ncm"])
def test_is_combined_with_nothing(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Chain({other: from_page(other), "independent": Independent()})
