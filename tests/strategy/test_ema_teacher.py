"""The EMA teacher against a hand-written loop with an average and a divergence of its own, and who answers when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import averages
import pytest
import torch
from averages import Breaks, Follower, scale_losses
from composed import trained
from naive import Model, Recorder
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, weights

import clplatform
from clplatform.strategy.ema_teacher import EMATeacher
from clplatform.types import Batch

STRENGTH, TEMPERATURE, DECAY = 1.5, 2.5, 0.9


def make(**changes: Any) -> EMATeacher:
    values = {"strength": STRENGTH, "temperature": TEMPERATURE, "decay": DECAY, **changes}
    strategy = from_page("ema_teacher", **values)
    assert isinstance(strategy, EMATeacher)
    return strategy


def run(folder: Path, teacher: EMATeacher, **options: Any) -> tuple[Any, Recorder]:
    """With a recorder behind it, which sees rows that others have added."""
    recorder = Recorder()
    first = options.pop("first", {})
    experiment = make_experiment(folder, {**first, "ema_teacher": teacher, "recorder": recorder}, **options)
    experiment.run()
    return experiment, recorder


def student_of(learner: Any) -> Model:
    return Model({n: t for n, t in weights(learner).items() if not n.startswith("extras")})


def divergence(student: Tensor, teacher: Tensor, mistake: str) -> Tensor:
    """τ² Σ_k p_k log(p_k / q_k), written out for one sample; p is the teacher's."""
    p, q = ((z / TEMPERATURE).exp() / (z / TEMPERATURE).exp().sum() for z in (teacher, student))
    if mistake == "the other way round":
        p, q = q, p
    return (1.0 if mistake == "no τ²" else TEMPERATURE**2) * (p * (p / q).log()).sum()


def learn(recorder: Recorder, *, by_task: bool = False, mistake: str = "") -> tuple[Model, Follower]:
    model, steps = Model(recorder.before[0]), 0
    teacher = Follower(model, DECAY, warm_up=mistake != "no warm-up")

    def cut(z: Tensor, label: int) -> Tensor:
        return z[label // 2 * 2 : label // 2 * 2 + 2] if by_task else z

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        then, terms = teacher(batch["pixel_values"]), []
        if mistake == "the new batch only":
            then = then[batch["source"] == 0]
        for i, (now, y) in enumerate(zip(logits, batch["labels"].tolist(), strict=True)):
            right = F.cross_entropy(cut(now, y), torch.tensor(y % 2 if by_task else y))
            old = divergence(cut(now, y), cut(then[i], y), mistake) if i < len(then) else 0.0
            terms.append(right + STRENGTH * old)
        return torch.stack(terms).mean()

    def before() -> None:
        if mistake == "before the step":
            teacher.update(model, steps + 1)

    def after() -> None:
        nonlocal steps
        steps += 1
        if mistake != "before the step":
            teacher.update(model, steps)

    for i, (start, batches) in enumerate(zip(recorder.before, recorder.batches, strict=True)):
        model.grow(start)
        teacher.grow(model, start)
        if mistake == "anew with every experience" and i > 0:
            teacher = Follower(model, DECAY)
        averages.train(model, batches, loss, before=before, after=after)
    return model, teacher


def check(experiment: Any, expected: tuple[Model, Follower]) -> None:
    model, teacher = expected
    found = student_of(experiment.learner).named()
    for name, value in model.named().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    averages.close(teacher.model, EMATeacher.teacher(experiment.learner))


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, replay: bool, tmp_path: Path) -> None:
    """Alone, and on a batch with replayed rows, whose loss is the mean over all of them."""
    first = {"replay": from_page("replay", batch_size=6)} if replay else {}
    experiment, recorder = run(tmp_path, make(), stream=TinyStream(2, scenario=scenario), first=first)
    assert len(recorder.batches[1][0]["labels"]) == 8 + 6 * replay
    check(experiment, learn(recorder, by_task=scenario == "task_incremental"))


MISTAKES = ["before the step", "no warm-up", "the other way round", "no τ²", "anew with every experience"]


@pytest.mark.parametrize("mistake", [*MISTAKES, "the new batch only"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    first = {"replay": from_page("replay", batch_size=6)}
    experiment, recorder = run(tmp_path, make(), stream=TinyStream(2), first=first)
    with pytest.raises(AssertionError, match="not close"):
        check(experiment, learn(recorder, mistake=mistake))


def test_nothing_to_learn_from_oneself(tmp_path: Path) -> None:
    """In the first step the teacher is the student: the term is zero, and so is its gradient."""
    teacher, stream = make(), TinyStream()
    learner: Any = make_experiment(tmp_path, {"ema_teacher": teacher}, stream=stream).learner
    learner.build(stream[0].info)
    batch = stream[0].train.fetch(torch.arange(16))
    output = learner(batch)
    term = teacher.loss(learner, batch, output)["ema_teacher"]
    assert term.abs() < 1e-6
    gradients = torch.autograd.grad(term, [*learner.backbone.parameters(), *learner.head.parameters()])
    assert max(g.abs().max() for g in gradients) < 1e-6


def test_the_teacher_has_no_dropout_while_the_student_trains(tmp_path: Path) -> None:
    teacher, stream = make(), TinyStream(2)
    experiment, _ = run(tmp_path, teacher, stream=stream, dropout=0.5)
    learner: Any = experiment.learner.train()
    batch = stream[1].train.fetch(torch.arange(16))
    output = learner(batch)
    plain = Model(averages.averaged(teacher.teacher(learner)))  # which has no dropout at all
    rows = zip(output.logits, plain(batch["pixel_values"]), strict=True)
    expected = STRENGTH * torch.stack([divergence(now, then, "") for now, then in rows]).mean()
    torch.testing.assert_close(teacher.loss(learner, batch, output)["ema_teacher"], expected)


def test_a_skipped_step_does_not_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_losses(monkeypatch)
    teacher = make()
    breaks = Breaks(6, lambda learner: [teacher.teacher(learner)])
    experiment = make_experiment(tmp_path, {"ema_teacher": teacher, "breaks": breaks}, stream=TinyStream(1))
    experiment.run()
    assert experiment.learner.steps == 7
    for i, ([then], [now]) in enumerate(zip(breaks.seen, breaks.seen[1:], strict=False)):
        assert any(not torch.equal(now[n], then[n]) for n in then) == (i + 2 != 6), i


@pytest.mark.parametrize("predict", ["teacher", "student"])
def test_who_answers(predict: str, tmp_path: Path) -> None:
    teacher, stream = make(predict=predict), TinyStream(2)
    experiment, _ = run(tmp_path, teacher, stream=stream)
    learner: Any = experiment.learner
    batch = stream[1].test.fetch(torch.arange(16))
    x = batch["pixel_values"]
    student, average = student_of(learner), Model(averages.averaged(teacher.teacher(learner)))
    assert not torch.allclose(student(x), average(x), atol=1e-3)
    learner.eval()
    with torch.no_grad():
        torch.testing.assert_close(learner(batch).logits, (average if predict == "teacher" else student)(x))
    torch.testing.assert_close(learner(batch).logits, student(x))  # gradients are of the student
    learner.train()
    with torch.no_grad():
        torch.testing.assert_close(learner(batch).logits, student(x))


@pytest.mark.parametrize("predict", ["teacher", "student"])
def test_a_saved_model_predicts_with_the_same_weights(predict: str, tmp_path: Path) -> None:
    overrides = ["backbone=mlp", "backbone.hidden=[16]", "strategy=ema_teacher", "stream.n_experiences=2"]
    run = trained(tmp_path, *overrides, f"strategy.ema_teacher.predict={predict}")
    predictor = clplatform.load(tmp_path)
    learner: Any = run.learner
    batch = run.stream[1].test.fetch(torch.arange(30))
    found = predictor.logits(batch["pixel_values"].numpy())
    average = EMATeacher.teacher(learner)(learner, batch).logits
    student = learner.run(batch).logits
    assert torch.equal(found, average if predict == "teacher" else student)
    assert not torch.allclose(average, student, atol=1e-4)
