"""LwF against a hand-written loop, the formula term by term, and Avalanche's plugin."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run, train
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.strategy.lwf import LwF, distillation
from clplatform.types import Batch

STRENGTH, TAU = 0.7, 3.0


def make() -> LwF:
    strategy = from_page("lwf", strength=STRENGTH, temperature=TAU)
    assert isinstance(strategy, LwF)
    return strategy


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """τ² Σ_k p_k (log p_k − log q_k) at temperature τ, mean over the batch, written out."""
    p = (teacher / TAU).exp() / (teacher / TAU).exp().sum(1, keepdim=True)
    q = (student / TAU).exp() / (student / TAU).exp().sum(1, keepdim=True)
    return TAU**2 * (p * (p.log() - q.log())).sum(1).mean()


def test_distillation_is_the_written_out_divergence() -> None:
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(distillation(student, teacher, TAU), kl(student, teacher))
    assert distillation(teacher, teacher, TAU).item() == pytest.approx(0)


def test_gradient_is_the_papers_cross_entropy_s() -> None:
    """∂/∂z = τ (q − p) / B; without τ² it would fade with 1/τ."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (gradient,) = torch.autograd.grad(distillation(student, teacher.detach(), TAU), student)
    expected = TAU * ((student / TAU).softmax(1) - (teacher / TAU).softmax(1)) / 5
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    """Old classes only; one term for each earlier task where task ids are known."""
    stream = TinyStream(scenario=scenario)
    experiment, recorder = run(tmp_path, "lwf", make(), stream=stream)
    model, teacher = Model(recorder.before[0]), None
    by_task = scenario == "task_incremental"
    for i, (start, batches) in enumerate(zip(recorder.before, recorder.batches, strict=True)):
        teacher = copy.deepcopy(model) if i else None  # before it grows
        model.grow(start)

        def loss(model: Model, batch: Batch, logits: Tensor, i: int = i, teacher: Model | None = teacher) -> Tensor:
            first = 2 * i if by_task else 0
            total = F.cross_entropy(logits[:, first:], batch["labels"] - first)
            if teacher is None:
                return total
            with torch.no_grad():
                then = teacher(batch["pixel_values"])
            groups = [slice(2 * t, 2 * t + 2) for t in range(i)] if by_task else [slice(0, then.shape[1])]
            return total + STRENGTH * sum(kl(logits[:, g], then[:, g]) for g in groups)

        train(model, batches, loss)
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_the_model_of_before_in_eval_mode(tmp_path: Path) -> None:
    lwf, stream = make(), TinyStream()
    experiment, recorder = run(tmp_path, "lwf", lwf, stream=stream, dropout=0.5)
    experiment.learner.train()
    assert lwf.teacher is not None
    before = recorder.after[1]
    for name, tensor in lwf.teacher.backbone.state_dict().items():
        assert torch.equal(tensor, before[f"backbone.{name}"])
    assert torch.equal(lwf.teacher.head.linear.weight[:4], before["head.linear.weight"])
    modules = [*lwf.teacher.backbone.modules(), *lwf.teacher.head.modules()]
    assert not any(m.training for m in modules)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    batch = stream[2].train.fetch(torch.arange(32))
    expected = Model(before)(batch["pixel_values"])  # which has no dropout at all
    torch.testing.assert_close(lwf.teacher(batch).logits[:, :4], expected)


def test_nothing_to_keep_in_the_first_experience(tmp_path: Path) -> None:
    lwf = make()
    make_experiment(tmp_path, {"lwf": lwf}, stream=TinyStream(1)).run()
    assert lwf.teacher is None
    assert lwf.cost() == {"extra_parameters": 0}


def test_replayed_rows_are_distilled_too(tmp_path: Path) -> None:
    lwf, recorder = make(), Recorder()
    terms: list[tuple[Tensor, Tensor, Tensor]] = []
    loss = lwf.loss

    def spy(learner: Any, batch: Batch, output: Any) -> dict[str, Tensor]:
        found = loss(learner, batch, output)
        if found:
            terms.append((found["lwf"].detach(), batch["pixel_values"], output.logits.detach()))
        return found

    lwf.loss = spy  # type: ignore[method-assign]
    strategies = {"replay": from_page("replay", batch_size=5), "lwf": lwf, "recorder": recorder}
    make_experiment(tmp_path, strategies, stream=TinyStream(2)).run()
    assert len(terms) == 8
    teacher = Model(recorder.after[0])
    for found, x, logits in terms:
        assert len(x) == 13
        torch.testing.assert_close(found, STRENGTH * kl(logits[:, :2], teacher(x)).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_agrees_with_avalanche_s_plugin(scenario: str, tmp_path: Path) -> None:
    """The real plugin, in a loop over the same batches: it has no τ², so α_avalanche = λ τ²."""
    from avalanche.training.plugins import LwFPlugin

    stream = TinyStream(scenario=scenario)
    experiment, recorder = run(tmp_path, "lwf", make(), stream=stream)
    model = Model(recorder.before[0])
    plugin, host = LwFPlugin(alpha=STRENGTH * TAU**2, temperature=TAU), SimpleNamespace(model=model)

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        host.mb_x, host.mb_output, host.loss = batch["pixel_values"], logits, F.cross_entropy(logits, batch["labels"])
        plugin.before_backward(host)
        return host.loss

    for experience, start, batches in zip(stream, recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches, loss)
        classes = SimpleNamespace(targets=SimpleNamespace(uniques=set(experience.classes)))
        dataset = SimpleNamespace(targets_task_labels=SimpleNamespace(uniques={0}), task_set={0: classes})
        host.experience = SimpleNamespace(dataset=dataset)
        plugin.after_training_exp(host)
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)
