"""MIR against brute force: a real step on a copy for each batch, one candidate after the other; and that asking for the
interference changes nothing."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Memory, Model, Recorder, close, run, samples, train
from strategies import from_page
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyBackbone, TinyStream, make_experiment, weights

from clplatform.schedule import schedule
from clplatform.strategy.base import Strategy
from clplatform.strategy.mir import MIR
from clplatform.types import Batch


def make(**changes: Any) -> MIR:
    strategy = from_page("mir", **{"batch_size": 4, "candidates": 3, "step": None, **changes})
    assert isinstance(strategy, MIR)
    return strategy


class Watched:
    """What a run's retrieval was asked and answered: weights, rate, batch, candidates and choice of every step."""

    def __init__(self, mir: MIR) -> None:
        self.steps: list[dict[str, Any]] = []
        sample, extend = mir.buffer.sample, mir.extend_batch
        drawn: list[Batch] = []

        def spy_sample(n: int, generator: torch.Generator) -> Batch:
            drawn.append(sample(n, generator))
            return drawn[-1]

        def spy_extend(learner: Any, batch: Batch) -> Batch:
            before, rate = weights(learner), learner.trainer.optimizers[0].param_groups[0]["lr"]
            extended = extend(learner, batch)
            if len(extended["labels"]) > len(batch["labels"]):
                self.steps.append(
                    {"weights": before, "rate": rate, "batch": batch, "candidates": drawn.pop(),
                     "chosen": extended["index"][len(batch["labels"]) :].tolist()}
                )  # fmt: skip
            return extended

        mir.buffer.sample, mir.extend_batch = spy_sample, spy_extend  # type: ignore[method-assign]


def surprise(model: Model, x: Tensor, y: Tensor, by_task: bool) -> Tensor:
    """Mean cross-entropy, over all classes or over the two of a sample's own task."""
    logits = model(x)
    if by_task:
        rows = zip(logits, y.tolist(), strict=True)
        logits, y = torch.stack([z[label // 2 * 2 : label // 2 * 2 + 2] for z, label in rows]), y % 2
    return F.cross_entropy(logits, y)


def rises(step: dict[str, Any], rate: float, *, by_task: bool = False, scale: float = 1.0) -> list[float]:
    """By how much each candidate's loss rises when a copy really takes the step."""
    model = Model(step["weights"])
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), lr=rate)
    (scale * surprise(moved, step["batch"]["pixel_values"], step["batch"]["labels"], by_task)).backward()
    optimizer.step()
    found = []
    for x, y in zip(step["candidates"]["pixel_values"], step["candidates"]["labels"], strict=True):
        before, after = (surprise(m, x[None], y[None], by_task) for m in (model, moved))
        found.append((after - before).item())
    return found


def best(step: dict[str, Any], scores: list[float], n: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)[:n]
    return [int(step["candidates"]["index"][i]) for i in order]


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_the_chosen_are_those_of_brute_force(scenario: str, tmp_path: Path) -> None:
    """With momentum in the optimizer, a rate that changes and dropout: none of them has a part in the choice."""
    mir, stream = make(), TinyStream(scenario=scenario)
    watched = Watched(mir)
    warm = partial(schedule, kind="linear", warmup=0.3)
    run(tmp_path, "mir", mir, stream=stream, dropout=0.5, schedule=warm)
    assert len(watched.steps) == 2 * 8
    assert len({step["rate"] for step in watched.steps}) > 5
    for step in watched.steps:
        assert len(step["candidates"]["labels"]) == 12
        if step["rate"] == 0:  # the first step of a warm-up: nobody suffers
            continue
        scores = rises(step, step["rate"], by_task=scenario == "task_incremental")
        assert step["chosen"] == best(step, scores, 4)


@pytest.mark.parametrize("mistake", ["least", "highest loss", "a step upwards"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    mir = make()
    watched = Watched(mir)
    run(tmp_path, "mir", mir)
    different = 0
    for step in watched.steps:
        scores = rises(step, step["rate"], scale=-1.0 if mistake == "a step upwards" else 1.0)
        if mistake == "least":
            scores = [-s for s in scores]
        if mistake == "highest loss":
            model = Model(step["weights"])
            rows = zip(step["candidates"]["pixel_values"], step["candidates"]["labels"], strict=True)
            scores = [surprise(model, x[None], y[None], False).item() for x, y in rows]
        different += sorted(step["chosen"]) != sorted(best(step, scores, 4))
    assert different > len(watched.steps) / 2


def test_a_step_size_of_its_own(tmp_path: Path) -> None:
    mir = make(step=3.0)
    watched = Watched(mir)
    run(tmp_path, "mir", mir)
    assert all(step["rate"] == 0.1 for step in watched.steps)
    assert all(step["chosen"] == best(step, rises(step, 3.0), 4) for step in watched.steps)
    assert any(step["chosen"] != best(step, rises(step, 0.1), 4) for step in watched.steps)


@pytest.mark.parametrize("update", ["experience", "batch"])
def test_training_is_that_of_a_hand_written_loop(update: str, tmp_path: Path) -> None:
    """On the batch and what was chosen: the virtual step leaves weights and momentum as they were."""
    mir, stream = make(update=update), TinyStream()
    watched = Watched(mir)
    experiment, recorder = run(tmp_path, "mir", mir, stream=stream)
    chosen, known = iter(step["chosen"] for step in watched.steps), samples(stream)
    used = 0

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        nonlocal used
        used += 1
        if used <= (8 if update == "experience" else 1):  # there is nothing to retrieve yet
            return F.cross_entropy(logits, batch["labels"])
        x, y = zip(*(known[i] for i in next(chosen)), strict=True)
        labels = torch.cat([batch["labels"], torch.tensor(y)])
        return F.cross_entropy(torch.cat([logits, model(torch.stack(x))]), labels)

    model = Model(recorder.before[0])
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches, loss)
    assert next(chosen, None) is None
    close(model, experiment.learner)


@pytest.mark.parametrize("update", ["experience", "batch"])
def test_a_sample_competes_once_and_candidates_come_from_where_it_says(update: str, tmp_path: Path) -> None:
    mir = make(update=update)
    memory = Memory(mir.buffer)
    _, extended = run(tmp_path, "mir", mir, last=True)
    memory.check(12)
    assert mir.buffer.n_seen == len(memory.keys) == 3 * 32
    for i, batches in enumerate(extended.batches):
        labels = torch.cat([b["labels"][b["source"] == 1] for b in batches])
        assert (labels < 2 * i).all() == (update == "experience")
        assert len(labels) == {"experience": 32 * (i > 0), "batch": 28 if i == 0 else 32}[update]


def test_a_small_memory_is_replayed_whole(tmp_path: Path) -> None:
    _, extended = run(tmp_path, "mir", make(capacity=6, batch_size=10), last=True)
    assert all(len(b["labels"]) == 8 + 6 for b in extended.batches[1])


# -- it changes nothing -------------------------------------------------------------------------------------------------


class NormBackbone(TinyBackbone):
    """With dropout, batch norm, and a part that stays in eval mode."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.norm, self.still = nn.BatchNorm1d(self.feature_size), nn.Dropout(0.5)

    def train(self, mode: bool = True) -> NormBackbone:
        super().train(mode)
        self.still.training = False
        return self

    def forward(self, batch: Batch) -> Tensor:
        return self.still(self.norm(super().forward(batch)))


class Guard(Recorder):
    """Before MIR in the chain: what a virtual step might disturb; and after it the same once more."""

    def __init__(self, other: Guard | None = None) -> None:
        super().__init__()
        self.other, self.state, self.compared = other, {}, 0

    def extend_batch(self, learner: Any, batch: Batch) -> Batch:
        optimizer = learner.trainer.optimizers[0]
        self.state = {
            **{f"weight {n}": t.clone() for n, t in learner.state_dict().items()},
            **{f"mode {n}": m.training for n, m in learner.named_modules()},
            **{f"gradient {n}": None if p.grad is None else p.grad.clone() for n, p in learner.named_parameters()},
            **{f"wants {n}": p.requires_grad for n, p in learner.named_parameters()},
            "identities": [id(p) for p in learner.parameters()],
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "random": torch.get_rng_state(),
        }
        if self.other is not None:
            assert self.state.keys() == self.other.state.keys()
            for name, value in self.state.items():
                before = self.other.state[name]
                assert equal(before, value), name
            self.compared += len(batch["labels"]) > 8
        return batch


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def test_nothing_is_disturbed(tmp_path: Path) -> None:
    first = Guard()
    last = Guard(first)
    chain: dict[str, Strategy] = {"first": first, "mir": make(), "last": last}
    make_experiment(tmp_path, chain, backbone=NormBackbone(), trainer={"accumulate_grad_batches": 2}).run()
    assert last.compared == 2 * 8
    assert any(m for n, m in last.state.items() if n.startswith("mode"))
    assert any(g is not None for n, g in last.state.items() if n.startswith("gradient"))


def test_frozen_weights_stand_still_in_the_virtual_step(tmp_path: Path) -> None:
    mir, stream = make(step=0.5), TinyStream(2)
    experiment = make_experiment(tmp_path, {"mir": mir}, stream=stream)
    experiment.run()
    learner: Any = experiment.learner
    learner.backbone.requires_grad_(False)
    batch, rows = (e.train.fetch(torch.arange(8)) for e in (stream[1], stream[0]))
    model = Model(weights(learner))
    moved = copy.deepcopy(model)
    F.cross_entropy(moved(batch["pixel_values"]), batch["labels"]).backward()
    with torch.no_grad():
        for p in moved.head.parameters():
            assert p.grad is not None
            p -= 0.5 * p.grad
    pairs = ((m(rows["pixel_values"]), rows["labels"]) for m in (moved, model))
    after, before = (F.cross_entropy(z, y, reduction="none") for z, y in pairs)
    torch.testing.assert_close(mir.interference(learner, batch, rows), after - before)


def test_it_forgets_less_than_fine_tuning(tmp_path: Path) -> None:
    retrieved = make_experiment(tmp_path / "a", {"mir": make(capacity=96, batch_size=8)}).run()
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}).run()
    assert retrieved.metrics["average_forgetting"] < 0.2  # type: ignore[operator]
    assert plain.metrics["average_forgetting"] > 0.5  # type: ignore[operator]
