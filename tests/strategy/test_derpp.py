"""DER++ against a hand-written loop with a reservoir of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Memory, Model, close, run, samples, train
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, same, weights

from clplatform.strategy.derpp import DERpp
from clplatform.types import Batch


def make(**changes: Any) -> DERpp:
    strategy = from_page("derpp", **changes)
    assert isinstance(strategy, DERpp)
    return strategy


def cross_entropy(logits: Tensor, labels: Tensor, by_task: bool) -> Tensor:
    """Over all classes so far, or over the two of a sample's own task."""
    if by_task:
        logits = torch.stack([row[y // 2 * 2 : y // 2 * 2 + 2] for row, y in zip(logits, labels.tolist(), strict=True)])
        labels = labels % 2
    return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
@pytest.mark.parametrize(("alpha", "beta", "drawn"), [(0.3, 0.7, 5), (0.3, 0.0, None), (0.0, 0.7, 5)])
def test_equals_a_hand_written_loop(
    scenario: str, alpha: float, beta: float, drawn: int | None, tmp_path: Path
) -> None:
    stream, derpp = TinyStream(2, scenario=scenario), make(alpha=alpha, beta=beta, batch_size=drawn)
    memory, by_task = Memory(derpp.buffer), scenario == "task_incremental"
    experiment, recorder = run(tmp_path, "derpp", derpp, stream=stream)
    memory.check(drawn or 8)
    draws, known = iter(memory.draws), samples(stream)
    z: list[Tensor] = []  # of every visit, when it was made

    def rows(model: Model, visits: list[int]) -> tuple[Tensor, Tensor]:
        x, y = zip(*(known[memory.index[v]] for v in visits), strict=True)
        return model(torch.stack(x)), torch.tensor(y)

    def squares(model: Model, visits: list[int]) -> Tensor:
        logits, labels = rows(model, visits)
        gaps = []
        for now, y, v in zip(logits, labels.tolist(), visits, strict=True):
            then = torch.cat([z[v], torch.zeros(len(now) - len(z[v]))])  # 0 for classes that came later
            compared = slice(y // 2 * 2, y // 2 * 2 + 2) if by_task else slice(None)
            gaps.append(now[compared] - then[compared])
        return torch.cat(gaps).pow(2).mean()

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        total = cross_entropy(logits, batch["labels"], by_task)
        if z and alpha:
            total = total + alpha * squares(model, next(draws))
        if z and beta:
            old, labels = rows(model, next(draws))
            total = total + beta * cross_entropy(old, labels, by_task)
        z.extend(logits.detach())
        return total

    model = Model(recorder.before[0])
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches, loss)
    assert next(draws, None) is None
    assert len(z) == len(memory.keys) == 2 * 2 * 32  # every visit competes: experiences × epochs × samples
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)


def test_the_memory_is_used_from_the_second_step_on(tmp_path: Path) -> None:
    _, extended = run(tmp_path, "derpp", make(batch_size=6), last=True, stream=TinyStream(1))
    sizes = [torch.bincount(b["source"].abs(), minlength=2).tolist() for b in extended.batches[0]]
    assert sizes == [[8, 0]] + [[8, 12]] * 7


def test_der_replays_logits_and_no_labels(tmp_path: Path) -> None:
    """Its page is DER++ with β = 0: one batch is drawn in a step, and what its labels are does not matter."""
    der, derpp = from_page("der"), make(alpha=0.3, beta=0.0)
    found, extended = run(tmp_path / "a", "der", der, last=True, stream=TinyStream(2))
    expected, _ = run(tmp_path / "b", "derpp", derpp, stream=TinyStream(2))
    assert same(weights(found.learner), weights(expected.learner))
    sizes = [torch.bincount(b["source"].abs(), minlength=2).tolist() for batches in extended.batches for b in batches]
    assert sizes == [[8, 0]] + [[8, 8]] * 15
    assert set(found.learner.last_terms) == {"loss", "task", "der_logits"}
    scrambled: Any = from_page("der")
    sample = scrambled.buffer.sample

    def other_labels(n: int, generator: torch.Generator) -> Batch:
        rows = sample(n, generator)
        return {**rows, "labels": torch.zeros_like(rows["labels"])}

    scrambled.buffer.sample = other_labels
    blind, _ = run(tmp_path / "c", "der", scrambled, stream=TinyStream(2))
    assert same(weights(blind.learner), weights(found.learner))


def test_der_forgets_less_than_fine_tuning(tmp_path: Path) -> None:
    """Without labels it is the logits alone, those of later classes among them, that hold old samples in place."""
    options: Any = {"stream": TinyStream(2), "trainer": {"max_epochs": 20}}
    der = make_experiment(tmp_path / "a", {"der": from_page("der", capacity=64)}, **options).run()
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}, **options).run()
    assert der.metrics["average_forgetting"] < 0.2  # type: ignore[operator]
    assert plain.metrics["average_forgetting"] > 0.4  # type: ignore[operator]


def test_the_two_batches_are_drawn_independently(tmp_path: Path) -> None:
    """Two of 5 from 20 share some rows in about 4 of 5 cases; parts of one draw would never, one draw twice always."""
    derpp = make(batch_size=5)
    memory = Memory(derpp.buffer)
    run(tmp_path, "derpp", derpp)
    pairs = list(zip(memory.draws[::2], memory.draws[1::2], strict=True))
    shared = [len(set(a) & set(b)) for a, b in pairs]
    assert len(pairs) == 23
    assert max(shared[5:]) < 5
    assert sum(n > 0 for n in shared[5:]) >= 5


def test_logits_are_stored_as_they_were_and_rewritten_by_nobody(tmp_path: Path) -> None:
    derpp = make()
    model_then: dict[int, Tensor] = {}
    after_batch = derpp.after_batch

    def spy(learner: Any, batch: Batch, output: Any) -> None:
        own = batch["source"] == 0
        for i, row in zip(batch["index"][own].tolist(), output.logits[own], strict=True):
            model_then[i, learner.current_epoch] = row.clone()  # type: ignore[index]
        after_batch(learner, batch, output)

    derpp.after_batch = spy  # type: ignore[method-assign]
    make_experiment(tmp_path, {"derpp": derpp}).run()
    stored = derpp.buffer.take(torch.arange(20))
    assert stored["logits"].shape == (20, 6)
    for i, y, z in zip(stored["index"].tolist(), stored["labels"].tolist(), stored["logits"], strict=True):
        k = 2 * (y // 2 + 1)  # classes that existed then
        assert any(torch.equal(z[:k], model_then[i, epoch]) for epoch in (0, 1))  # type: ignore[index]
        assert (z[k:] == 0).all()


def test_without_both_terms_it_is_fine_tuning(tmp_path: Path) -> None:
    nothing = make_experiment(tmp_path / "a", {"derpp": make(alpha=0.0, beta=0.0)})
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")})
    nothing.run(), plain.run()
    assert same(weights(nothing.learner), weights(plain.learner))
