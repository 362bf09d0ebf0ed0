"""ER-ACE against a hand-written loop with a softmax written out and a reservoir of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Memory, Model, Recorder, close, run, samples, train
from strategies import from_page
from torch import Tensor
from world import TinyStream, make_experiment, make_learner

from clplatform.strategy.er_ace import ERACE
from clplatform.types import Batch, Output


def make(**changes: Any) -> ERACE:
    strategy = from_page("er_ace", **changes)
    assert isinstance(strategy, ERACE)
    return strategy


def surprise(logits: Tensor, label: int, classes: list[int]) -> Tensor:
    """−log of one sample's softmax over some classes, written out."""
    return -torch.log(logits[label].exp() / sum(logits[c].exp() for c in classes))


def learn(recorder: Recorder, memory: Memory, stream: TinyStream, mistake: str = "") -> Model:
    """The loop; `mistake`: a usual one."""
    draws, known = iter(memory.draws), samples(stream)
    by_task = stream.info.scenario == "task_incremental"
    model, steps = Model(recorder.before[0]), 0

    def everything(logits: Tensor, label: int) -> list[int]:
        return [label // 2 * 2, label // 2 * 2 + 1] if by_task else list(range(len(logits)))

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        labels = batch["labels"].tolist()
        current = sorted(set(labels))
        if mistake == "nothing is masked":
            new = [surprise(z, y, everything(z, y)) for z, y in zip(logits, labels, strict=True)]
        else:
            new = [surprise(z, y, current) for z, y in zip(logits, labels, strict=True)]
        if steps == 1:
            return torch.stack(new).mean()
        x, y = zip(*(known[memory.index[visit]] for visit in next(draws)), strict=True)
        replayed = model(torch.stack(x))
        if mistake == "replayed rows are masked too":
            old = [surprise(z, label, sorted({*current, label})) for z, label in zip(replayed, y, strict=True)]
        else:
            old = [surprise(z, label, everything(z, label)) for z, label in zip(replayed, y, strict=True)]
        if mistake == "one mean over both":
            return torch.stack(new + old).mean()
        return torch.stack(new).mean() + torch.stack(old).mean()

    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches, loss)
    assert next(draws, None) is None
    return model


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
@pytest.mark.parametrize("drawn", [5, None])
def test_equals_a_hand_written_loop(scenario: str, drawn: int | None, tmp_path: Path) -> None:
    stream, er_ace = TinyStream(scenario=scenario), make(batch_size=drawn)
    memory = Memory(er_ace.buffer)
    experiment, recorder = run(tmp_path, "er_ace", er_ace, stream=stream)
    memory.check(drawn or 8)
    assert len(memory.keys) == 3 * 32  # a sample competes once: not in the second epoch, not when it is replayed
    close(learn(recorder, memory, stream), experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mistake", ["nothing is masked", "replayed rows are masked too", "one mean over both"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    stream, er_ace = TinyStream(), make()
    memory = Memory(er_ace.buffer)
    experiment, recorder = run(tmp_path, "er_ace", er_ace, stream=stream)
    with pytest.raises(AssertionError, match="not close"):
        close(learn(recorder, memory, stream, mistake), experiment.learner, rtol=1e-4, atol=1e-5)


def batch_of(learner: Any, labels: list[int], sources: list[int]) -> tuple[Batch, Output]:
    """A hand-made batch in the last of three experiences, with logits that can be differentiated."""
    n = len(labels)
    batch = {"labels": torch.tensor(labels), "task_labels": torch.zeros(n, dtype=torch.int64)}
    batch |= {"source": torch.tensor(sources), "index": torch.arange(n)}
    logits = torch.randn(n, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return batch, Output(logits, torch.zeros(n, 16))


def at_the_third(er_ace: ERACE, **options: Any) -> Any:
    stream = TinyStream()
    learner = make_learner(stream, {"er_ace": er_ace}, **options)
    for experience in stream:
        learner.build(experience.info)
        learner.experience = experience
    return learner


@pytest.mark.parametrize(("classes", "current"), [("batch", [4]), ("experience", [4, 5])])
def test_new_samples_compete_among_the_batch_s_or_the_experience_s_classes(classes: str, current: list[int]) -> None:
    er_ace = make(classes=classes)
    learner = at_the_third(er_ace)
    batch, output = batch_of(learner, [4, 4, 4], [0, 0, 0])
    found = er_ace.task_loss(learner, batch, output)
    expected = torch.stack([surprise(z, 4, current) for z in output.logits]).mean()
    torch.testing.assert_close(found, expected)
    assert (found > 0.1) == (classes == "experience")
    found.backward()
    assert output.logits.grad is not None
    touched = output.logits.grad.abs().sum(0) > 0
    assert touched.nonzero()[:, 0].tolist() == (current if classes == "experience" else [])
    assert er_ace.loss(learner, batch, output) == {}  # nothing is replayed


def test_rows_that_another_strategy_replays_are_replayed_rows() -> None:
    er_ace = make()
    learner = at_the_third(er_ace)
    batch, output = batch_of(learner, [4, 5, 0, 1, 3], [0, 0, 1, 7, -7])
    new = torch.stack([surprise(output.logits[i], batch["labels"][i], [4, 5]) for i in (0, 1)]).mean()  # type: ignore[arg-type]
    everything = list(range(6))
    old = torch.stack([surprise(output.logits[i], batch["labels"][i], everything) for i in (2, 3, 4)]).mean()  # type: ignore[arg-type]
    torch.testing.assert_close(er_ace.task_loss(learner, batch, output), new)
    torch.testing.assert_close(er_ace.loss(learner, batch, output)["replayed"], old)


def test_labels_are_smoothed_over_the_classes_that_compete() -> None:
    er_ace = make()
    learner = at_the_third(er_ace, label_smoothing=0.2)
    batch, output = batch_of(learner, [4, 5, 5], [0, 0, 0])
    expected = []
    for z, y in zip(output.logits, [4, 5, 5], strict=True):
        terms = {c: surprise(z, c, [4, 5]) for c in (4, 5)}
        expected.append(0.8 * terms[y] + 0.2 * (terms[4] + terms[5]) / 2)
    torch.testing.assert_close(er_ace.task_loss(learner, batch, output), torch.stack(expected).mean())


def test_the_memory_keeps_what_came_before_augmentation(tmp_path: Path) -> None:
    def flip(batch: Batch, generator: torch.Generator) -> Batch:
        return {**batch, "pixel_values": -batch["pixel_values"] - 100}

    er_ace, stream = make(), TinyStream()
    make_experiment(tmp_path, {"er_ace": er_ace}, stream=stream, augment=flip).run()
    stored, known = er_ace.buffer.take(torch.arange(20)), samples(stream)
    for i, x in zip(stored["index"], stored["pixel_values"], strict=True):
        assert torch.equal(x, known[int(i)][0])


def test_it_forgets_less_than_fine_tuning(tmp_path: Path) -> None:
    ace = make_experiment(tmp_path / "a", {"er_ace": make(capacity=12)}).run()
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}).run()
    assert ace.metrics["average_forgetting"] < 0.2  # type: ignore[operator]
    assert plain.metrics["average_forgetting"] > 0.5  # type: ignore[operator]
