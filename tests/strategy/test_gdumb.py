"""GDumb: what the memory holds, that training sees the memory and nothing else, from fresh weights, at the paper's rates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, cross_entropy, samples
from strategies import from_page
from torch import Tensor
from world import TinyStream, make_experiment, same, weights

from clplatform.schedule import schedule
from clplatform.strategy.base import Chain
from clplatform.strategy.gdumb import GDumb, annealed
from clplatform.types import Batch, Experience


def make(**changes: Any) -> GDumb:
    strategy = from_page("gdumb", **changes)
    assert isinstance(strategy, GDumb)
    return strategy


class Watcher(Recorder):
    """After GDumb in the chain: the weights it starts from, the batches, the rates of every epoch and the memory."""

    family = "plugin"  # GDumb shares with no baseline

    def __init__(self, gdumb: GDumb) -> None:
        super().__init__()
        self.gdumb = gdumb
        self.rates: list[list[float]] = []
        self.memories: list[dict[str, Tensor]] = []

    def before_experience(self, learner: Any, experience: Experience) -> None:
        super().before_experience(learner, experience)
        self.rates.append([])
        self.memories.append(self.gdumb.buffer.take(torch.arange(len(self.gdumb.buffer))))

    def before_epoch(self, learner: Any) -> None:
        groups = learner.trainer.optimizers[0].param_groups
        assert len({group["lr"] for group in groups}) == 1
        self.rates[-1].append(groups[0]["lr"])


def run(folder: Path, gdumb: GDumb, **options: Any) -> tuple[Any, Watcher]:
    watcher = Watcher(gdumb)
    experiment = make_experiment(folder, {"gdumb": gdumb, "watcher": watcher}, **options)
    experiment.run()
    return experiment, watcher


# -- the memory -----------------------------------------------------------------------------------------------------------


def algorithm_1(stream: TinyStream, capacity: int) -> list[list[int]]:
    """Samples of each class after each experience, by the paper's sampler, one sample after the other."""
    counts: dict[int, int] = {}
    found = []
    for experience in stream:
        order = torch.randperm(len(experience.train), generator=torch.Generator().manual_seed(0))
        for label in experience.train.labels[order].tolist():
            share = capacity / max(1, len(counts))
            if label not in counts or counts[label] < share:
                if sum(counts.values()) >= capacity:
                    counts[max(counts, key=lambda c: counts[c])] -= 1
                counts[label] = counts.get(label, 0) + 1
        found.append(sorted(counts.values()))
    return found


@pytest.mark.parametrize("capacity", [6, 7, 13, 20, 40, 200])
def test_the_memory_is_balanced_as_the_paper_s(capacity: int, tmp_path: Path) -> None:
    stream = TinyStream()
    _, watcher = run(tmp_path, make(capacity=capacity, epochs=1), stream=stream)
    shares = [sorted(torch.bincount(memory["labels"]).tolist()) for memory in watcher.memories]
    for ours, theirs in zip(shares, algorithm_1(stream, capacity), strict=True):
        assert sum(ours) == min(capacity, 16 * len(ours))
        assert max(ours) - min(ours) <= 1
        assert len(ours) == len(theirs)
        assert all(abs(a - b) <= 1 for a, b in zip(ours, theirs, strict=True))


def test_the_same_classes_in_another_domain_get_in(tmp_path: Path) -> None:
    _, watcher = run(tmp_path, make(capacity=60, epochs=1), stream=TinyStream(scenario="domain_incremental"))
    known = {int(i): e.index for e in TinyStream(scenario="domain_incremental") for i in e.train.columns["index"]}  # type: ignore[attr-defined]
    domains = torch.bincount(torch.tensor([known[int(i)] for i in watcher.memories[-1]["index"]]), minlength=3)
    assert domains.min() >= 12


def test_the_memory_keeps_what_came_before_augmentation(tmp_path: Path) -> None:
    def shift(batch: Batch, generator: torch.Generator) -> Batch:
        return {**batch, "pixel_values": batch["pixel_values"] + 100}

    gdumb, stream, seen = make(), TinyStream(), []

    class Looks(Recorder):
        family = "plugin"

        def after_batch(self, learner: Any, batch: Batch, output: Any) -> None:
            seen.append(batch["pixel_values"].mean().item())

    make_experiment(tmp_path, {"gdumb": gdumb, "looks": Looks()}, stream=stream, augment=shift).run()
    stored, known = gdumb.buffer.take(torch.arange(20)), samples(stream)
    for i, x in zip(stored["index"], stored["pixel_values"], strict=True):
        assert torch.equal(x, known[int(i)][0])
    assert min(seen) > 90  # training is on augmented samples


# -- training -------------------------------------------------------------------------------------------------------------


def test_training_sees_the_memory_and_nothing_else(tmp_path: Path) -> None:
    _, watcher = run(tmp_path, make(epochs=3))
    for memory, batches in zip(watcher.memories, watcher.batches, strict=True):
        assert len(batches) == 3 * 3
        for epoch in range(3):
            index = torch.cat([b["index"] for b in batches[3 * epoch : 3 * epoch + 3]])
            assert sorted(index.tolist()) == sorted(memory["index"].tolist())
            assert len(index.unique()) == 20
        for batch in batches:
            places = (memory["index"][None] == batch["index"][:, None]).long().argmax(1)
            assert torch.equal(batch["pixel_values"], memory["pixel_values"][places])
            assert torch.equal(batch["labels"], memory["labels"][places])
            assert not batch["source"].any()


@pytest.mark.parametrize("minimum", [0.01, None])
@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, minimum: float | None, tmp_path: Path) -> None:
    stream = TinyStream(scenario=scenario)
    experiment, watcher = run(tmp_path, make(epochs=6, minimum=minimum), stream=stream)
    first = watcher.before[0]
    for start, after, batches in zip(watcher.before, watcher.after, watcher.batches, strict=True):
        assert all(torch.equal(start[n], first[n]) for n in first if n.startswith("backbone"))
        model = Model(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for i, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 0.1 * (rates(6, 0.01)[i // 3] if minimum else 1.0)
            optimizer.zero_grad()
            cross_entropy(model, batch, model(batch["pixel_values"])).backward()
            optimizer.step()
        for name, value in model.named().items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
    close(model, experiment.learner)


def test_every_experience_starts_from_a_fresh_head(tmp_path: Path) -> None:
    _, watcher = run(tmp_path, make())
    for start, trained in zip(watcher.before[1:], watcher.after, strict=False):
        n = len(trained["head.linear.bias"])
        old = trained["head.linear.weight"]
        assert not torch.isclose(start["head.linear.weight"][:n], old).any()
        assert not torch.isclose(start["head.linear.weight"][:n], watcher.before[0]["head.linear.weight"][:1]).any()


def test_the_trainer_s_epochs_where_none_are_given(tmp_path: Path) -> None:
    _, watcher = run(tmp_path, make(epochs=None), trainer={"max_epochs": 4})
    assert [len(batches) for batches in watcher.batches] == [12, 12, 12]


# -- the rate ---------------------------------------------------------------------------------------------------------------


def rates(epochs: int, minimum: float) -> list[float]:
    """Those of the authors' loop around PyTorch's scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=minimum)
    found = []
    for epoch in range(epochs):
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = 0.1
        elif epoch == 1:
            optimizer.param_groups[0]["lr"] = 1.0
        else:
            optimizer.step()
            cosine.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_rate_is_pytorch_s_over_the_paper_s_epochs() -> None:
    found = [annealed(epoch, 0.01) for epoch in range(256)]
    assert found == pytest.approx(rates(256, 0.01), rel=1e-9)
    restarts = [epoch for epoch, rate in enumerate(found) if rate == 1.0]
    assert restarts == [1, 2, 4, 8, 16, 32, 64, 128]
    assert found[-1] < 0.0102  # the last epoch ends a cycle


def test_the_rate_of_every_epoch(tmp_path: Path) -> None:
    _, watcher = run(tmp_path / "a", make(epochs=9))
    for found in watcher.rates:
        assert found == pytest.approx([0.1 * rate for rate in rates(9, 0.01)], rel=1e-9)
    _, plain = run(tmp_path / "b", make(epochs=3, minimum=None))
    assert plain.rates == [[0.1] * 3] * 3


def test_a_scheduler_that_is_chosen_takes_its_place(tmp_path: Path) -> None:
    cosine = partial(schedule, kind="cosine", warmup=0.0)
    ours, watcher = run(tmp_path / "a", make(epochs=4), schedule=cosine)
    theirs, _ = run(tmp_path / "b", make(epochs=4, minimum=None), schedule=cosine)
    assert same(weights(ours.learner), weights(theirs.learner))
    assert watcher.rates[0] == sorted(watcher.rates[0], reverse=True)
    assert watcher.rates[0][0] == 0.1


class Killed(Exception):
    pass


@pytest.mark.parametrize("batch", [8, 20, 23, 31])
def test_a_run_broken_off_goes_on_at_the_annealed_rate(batch: int, tmp_path: Path) -> None:
    """In the middle of an epoch `before_epoch` is not called again; the rate must be there."""
    fitter = {"checkpoint_every": 2}
    whole = make_experiment(tmp_path / "a", {"gdumb": make(epochs=4)}, fitter=fitter)
    whole.run()
    killed = make_experiment(tmp_path / "b", {"gdumb": make(epochs=4)}, fitter=fitter)
    count = 0

    def kill(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == batch:
            raise Killed

    killed.fitter.after_batch = kill
    with pytest.raises(Killed):
        killed.run()
    assert (tmp_path / "b" / "checkpoints" / "step.ckpt").exists()
    resumed = make_experiment(tmp_path / "b", {"gdumb": make(epochs=4)}, fitter=fitter)
    resumed.run(resume=True)
    assert same(weights(resumed.learner), weights(whole.learner))


# -- with others --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["replay", "derpp", "joint", "cumulative", "lora_experts"])
def test_it_shares_with_nobody_who_adds_data_or_parts(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Chain({"gdumb": make(), other: from_page(other)})


def test_it_forgets_little_however_the_stream_goes_on(tmp_path: Path) -> None:
    results = make_experiment(tmp_path, {"gdumb": make(capacity=48, epochs=20)}).run()
    assert results.metrics["average_forgetting"] < 0.1  # type: ignore[operator]
    assert min(results.matrix[-1]) > 0.85  # type: ignore[type-var, operator]
