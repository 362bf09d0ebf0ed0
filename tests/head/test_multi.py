"""Every task has its own classifier; a task that comes back finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heads import info
from torch import Tensor, nn
from world import TinyStream, make_experiment

from clplatform.build import check_needs
from clplatform.head.multi import MultiHead
from clplatform.strategy.base import Chain
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import MASKED, ClplatformError

# Task 1 shares a class with task 0; task 0 comes back with one class more.
EXPERIENCES = [info(0, (0, 1), 2), info(1, (1, 2), 3, task=1), info(2, (3,), 4, task=2), info(3, (0, 1, 4), 5)]
CLASSES = {0: (0, 1, 4), 1: (1, 2), 2: (3,)}


def multi(experiences: Any = EXPERIENCES) -> MultiHead:
    torch.manual_seed(0)
    head = MultiHead(feature_size=5)
    for experience in experiences:
        head.grow(experience)
    return head


def classifier(head: MultiHead, task: int, k: int) -> tuple[Tensor, Tensor]:
    row = head.row_of[task, k]
    assert head.linear is not None and row >= 0
    return head.linear.weight[row], head.linear.bias[row]


@torch.no_grad()
def test_a_sample_gets_the_logits_of_its_own_task_and_no_other() -> None:
    head, x = multi(), torch.randn(6, 5)
    tasks = torch.tensor([0, 1, 2, 2, 1, 0])
    logits = head(x, tasks)
    assert logits.shape == (6, 5)
    for i, task in enumerate(tasks.tolist()):
        for k in range(5):
            if k in CLASSES[task]:
                weight, bias = classifier(head, task, k)
                assert logits[i, k].item() == pytest.approx(sum(x[i] * weight).item() + bias.item(), abs=1e-5)
            else:
                assert logits[i, k] == MASKED
    alone = torch.cat([head(x[i : i + 1], tasks[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(logits, alone)


def test_tasks_that_share_a_class_have_a_row_each() -> None:
    head = multi()
    rows = [int(head.row_of[task, k]) for task, classes in CLASSES.items() for k in classes]
    assert len(set(rows)) == 6 == head.linear.out_features  # type: ignore[union-attr]
    assert (head.row_of >= 0).sum() == 6


@torch.no_grad()
def test_growing_keeps_every_classifier_and_a_task_that_comes_back_finds_its_own() -> None:
    head = multi(EXPERIENCES[:1])
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for experience in EXPERIENCES:
        head.grow(experience)
        assert head.linear is not None
        for (task, k), (weight, bias) in kept.items():
            assert torch.equal(classifier(head, task, k)[0], weight)
            assert torch.equal(classifier(head, task, k)[1], bias)
        nn.init.normal_(head.linear.weight)  # what an experience learns
        known = [(t, k) for t in range(len(head.row_of)) for k in range(head.row_of.shape[1]) if head.row_of[t, k] >= 0]
        kept = {key: tuple(part.clone() for part in classifier(head, *key)) for key in known}  # type: ignore[misc]
    assert head.linear.out_features == 6
    assert set(kept) == {(task, k) for task, classes in CLASSES.items() for k in classes}


def test_growing_again_changes_nothing() -> None:
    head = multi()
    linear, rows, state = head.linear, head.row_of.clone(), torch.get_rng_state()
    for experience in (EXPERIENCES[3], EXPERIENCES[1]):
        head.grow(experience)
    assert head.linear is linear
    assert torch.equal(head.row_of, rows)
    assert torch.equal(state, torch.get_rng_state())


@torch.no_grad()
def test_weights_are_loaded_into_the_structure_that_metadata_tell() -> None:
    head, x, tasks = multi(), torch.randn(3, 5), torch.tensor([0, 1, 2])
    again = MultiHead(feature_size=5)
    for experience in EXPERIENCES:
        again.grow(experience)
    assert set(head.state_dict()) == {"linear.weight", "linear.bias"}
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(x, tasks), head(x, tasks))


def test_only_the_sample_s_task_learns() -> None:
    head = multi()
    loss = nn.functional.cross_entropy(head(torch.randn(4, 5), torch.tensor([1, 1, 1, 1])), torch.tensor([1, 2, 2, 1]))
    assert loss < 20  # what is masked counts for nothing
    loss.backward()
    assert head.linear is not None and head.linear.weight.grad is not None
    rows = head.linear.weight.grad.any(1).nonzero()[:, 0].tolist()
    assert rows == [int(head.row_of[1, k]) for k in CLASSES[1]]


def test_in_a_run_an_earlier_task_s_classifier_is_untouched(tmp_path: Path) -> None:
    experiment = make_experiment(
        tmp_path, {"finetuning": Finetuning()}, stream=TinyStream(scenario="task_incremental"), trainer={"max_epochs": 4},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )  # fmt: skip
    learner = experiment.learner
    learner.make_head = lambda: MultiHead(feature_size=16)
    learner.head = learner.make_head()
    rows: list[Tensor] = []

    class Watch:
        def start_experience(self, *args: object) -> None: ...

        def finish_experience(self, *args: object) -> None:
            rows.append(learner.head.linear.weight.detach().clone())

    experiment.observers = [Watch()]
    matrix = experiment.run().matrix
    assert torch.equal(rows[3][:2], rows[1][:2])
    assert not torch.equal(rows[1][:2], rows[0])
    assert all(matrix[i + 1][i] > 0.9 for i in range(3))  # type: ignore[operator]


def test_it_needs_task_ids() -> None:
    config = {
        "head": {"_target_": "clplatform.head.multi.MultiHead"},
        "backbone": {"name": "mlp", "_target_": "clplatform.backbone.mlp.MLP"},
    }
    chain = Chain({"finetuning": Finetuning()})
    with pytest.raises(ClplatformError, match="head=multi needs task ids.*scenario=task_incremental"):
        check_needs(chain, TinyStream().info, config)
    check_needs(chain, TinyStream(scenario="task_incremental").info, config)
