"""Experience replay: what the memory holds, what a step sees, and the loss as the mean over both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exemplars import brute_force
from naive import Memory, Model, Recorder, close, run, samples, train
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.strategy.finetuning import Finetuning
from clplatform.strategy.replay import Replay
from clplatform.types import Batch, ClplatformError


def make(**changes: Any) -> Replay:
    strategy = from_page("replay", **changes)
    assert isinstance(strategy, Replay)
    return strategy


@pytest.mark.parametrize(("drawn", "update"), [(5, "experience"), (None, "experience"), (5, "batch")])
def test_equals_a_hand_written_loop(drawn: int | None, update: str, tmp_path: Path) -> None:
    """The loss is the mean over the batch and the drawn rows together, not the sum of two means."""
    stream, replay = TinyStream(), make(batch_size=drawn, update=update)
    memory = Memory(replay.buffer)
    experiment, recorder = run(tmp_path, "replay", replay, stream=stream)
    memory.check(drawn or 8)
    draws, known = iter(memory.draws), samples(stream)
    used = 0

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        nonlocal used
        used += 1
        without = 4 * 2 if update == "experience" else 1  # steps until there is something to draw
        if used <= without:
            return F.cross_entropy(logits, batch["labels"])
        rows = [known[memory.index[visit]] for visit in next(draws)]
        old, labels = model(torch.stack([x for x, _ in rows])), torch.tensor([y for _, y in rows])
        both = F.cross_entropy(logits, batch["labels"], reduction="sum") + F.cross_entropy(old, labels, reduction="sum")
        return both / (len(batch["labels"]) + len(rows))

    model = Model(recorder.before[0])
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches, loss)
    assert next(draws, None) is None
    close(model, experiment.learner)


def test_an_extended_batch_is_the_batch_and_then_the_memory_s_rows(tmp_path: Path) -> None:
    replay = make(batch_size=5)
    _, plain = run(tmp_path / "a", "replay", replay)
    _, extended = run(tmp_path / "b", "replay", make(batch_size=5), last=True)
    for experience, (before, after) in enumerate(zip(plain.batches, extended.batches, strict=True)):
        for b, a in zip(before, after, strict=True):
            assert a["source"].tolist() == [0] * 8 + [1] * 5 * (experience > 0)
            for name in b:
                assert torch.equal(a[name][:8], b[name])
            assert (a["labels"][8:] < 2 * experience).all()  # earlier experiences only


@pytest.mark.parametrize("update", ["experience", "batch"])
def test_a_sample_competes_once_however_often_it_is_trained_on_or_replayed(update: str, tmp_path: Path) -> None:
    replay = make(update=update, capacity=90)
    run(tmp_path, "replay", replay, trainer={"max_epochs": 3})
    assert replay.buffer.n_seen == 3 * 32
    stored = replay.buffer.take(torch.arange(90))["index"]
    assert len(stored.unique()) == 90


def test_the_memory_keeps_what_came_before_augmentation(tmp_path: Path) -> None:
    def flip(batch: Batch, generator: torch.Generator) -> Batch:
        return {**batch, "pixel_values": -batch["pixel_values"] - 100}

    for update in ("experience", "batch"):
        replay, stream = make(update=update), TinyStream()
        make_experiment(tmp_path / update, {"replay": replay}, stream=stream, augment=flip).run()
        stored, known = replay.buffer.take(torch.arange(20)), samples(stream)
        for i, x in zip(stored["index"], stored["pixel_values"], strict=True):
            assert torch.equal(x, known[int(i)][0])


def test_replayed_rows_are_augmented_like_the_others(tmp_path: Path) -> None:
    seen = []

    def shift(batch: Batch, generator: torch.Generator) -> Batch:
        seen.append(len(batch["labels"]))
        return {**batch, "pixel_values": batch["pixel_values"] + 1}

    make_experiment(tmp_path, {"replay": make(batch_size=3)}, augment=shift, stream=TinyStream(2)).run()
    assert seen == [8] * 8 + [11] * 8


@pytest.mark.parametrize("update", ["experience", "batch"])
def test_class_balanced_shares(update: str, tmp_path: Path) -> None:
    """Twenty places for six classes: three or four each, at every point of the stream as equal as can be."""
    replay, shares = make(policy="class_balanced", update=update), []
    experiment = make_experiment(tmp_path, {"replay": replay})
    record = experiment._record

    def spy(experience: Any, times: Any) -> None:
        shares.append(sorted(torch.bincount(replay.buffer.labels).tolist()))
        record(experience, times)

    experiment._record = spy  # type: ignore[method-assign]
    experiment.run()
    assert shares == [[10, 10], [5, 5, 5, 5], [3, 3, 3, 3, 4, 4]]


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_herding_keeps_each_class_s_exemplars_by_the_model_of_then(scenario: str, tmp_path: Path) -> None:
    """Of unaugmented samples, without dropout, normalised; the first chosen stay when the shares shrink."""

    def shift(batch: Batch, generator: torch.Generator) -> Batch:
        return {**batch, "pixel_values": batch["pixel_values"] + 3}

    replay, stream = make(policy="herding"), TinyStream(scenario=scenario)
    kept: list[dict[int, set[int]]] = []

    class Watch(Finetuning):
        def after_experience(self, learner: Any, experience: Any) -> None:
            rows = replay.buffer.take(torch.arange(len(replay.buffer)))
            kept.append({c: set(rows["index"][rows["labels"] == c].tolist()) for c in range(learner.n_classes)})

    recorder = Recorder()
    strategies = {"replay": replay, "watch": Watch(), "recorder": recorder}
    make_experiment(tmp_path, strategies, stream=stream, dropout=0.5, augment=shift).run()
    order: dict[tuple[int, int], list[int]] = {}
    for experience, after, stored in zip(stream, recorder.after, kept, strict=True):
        batch = experience.train.fetch(torch.arange(32))
        for c in experience.classes:
            rows = batch["labels"] == c
            best = brute_force(Model(after).features(batch["pixel_values"][rows]).detach(), 20)
            order[experience.index, c] = [int(batch["index"][rows][i]) for i in best]
        sizes = {c: len(indices) for c, indices in stored.items()}
        assert sum(sizes.values()) == 20
        assert max(sizes.values()) - min(sizes.values()) <= 1
        for c, indices in stored.items():
            parts = [set(ranked) & indices for (_, label), ranked in order.items() if label == c]
            assert sum(len(part) for part in parts) == sizes[c]
            ranks = [r for (_, label), r in order.items() if label == c]
            for part, ranked in zip(parts, ranks, strict=True):
                assert part == set(ranked[: len(part)])
                assert len(part) in (sizes[c] // len(parts), -(-sizes[c] // len(parts)))


def test_herding_cannot_choose_batch_by_batch() -> None:
    from clplatform.build import build_strategies

    node = {"_target_": "clplatform.strategy.replay.Replay", "capacity": 20, "batch_size": None, "device": "cpu"}
    message = r"strategy\.replay: policy=herding .* give update=experience"
    with pytest.raises(ClplatformError, match=message):
        build_strategies({"strategy": {"replay": {**node, "policy": "herding", "update": "batch"}}})


def test_it_forgets_less_than_fine_tuning(tmp_path: Path) -> None:
    replayed = make_experiment(tmp_path / "a", {"replay": make(capacity=96)}).run()
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}).run()
    assert replayed.metrics["average_forgetting"] < 0.15  # type: ignore[operator]
    assert plain.metrics["average_forgetting"] > 0.5  # type: ignore[operator]
