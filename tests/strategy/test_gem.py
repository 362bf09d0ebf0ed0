"""GEM against a hand-written loop whose quadratic program another solver solves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quadprog
import torch
from naive import Model, close, run, samples
from projected import learn, loss_gradient
from strategies import from_page
from torch import Tensor
from world import TinyStream, make_experiment

from clplatform.strategy.gem import GEM
from clplatform.types import Batch


def make(**changes: Any) -> GEM:
    strategy = from_page("gem", **changes)
    assert isinstance(strategy, GEM)
    return strategy


class Drawn:
    """Beside a strategy: the samples (their indices) of each earlier experience that each step has seen."""

    def __init__(self, gem: GEM) -> None:
        self.steps: list[list[list[int]]] = []
        draw = gem.draw

        def spy(learner: Any) -> list[Batch]:
            rows = draw(learner)
            self.steps.append([part["index"].tolist() for part in rows])
            return rows

        gem.draw = spy  # type: ignore[method-assign]


class ByHand:
    """min ½ vᵀ G Gᵀ v + (G g)ᵀ v with v ≥ γ by quadprog; and the usual mistakes."""

    def __init__(self, drawn: Drawn, stream: Any, *, margin: float, without: int, mistake: str = "") -> None:
        self.steps, self.known, self.margin, self.left = iter(drawn.steps), samples(stream), margin, without
        self.mistake, self.conflicts = mistake, []

    def __call__(self, model: Model, g: Tensor) -> Tensor:
        self.left -= 1
        if self.left >= 0:
            return g
        parts = [[self.known[i] for i in part] for part in next(self.steps)]
        if self.mistake == "one gradient for all":
            parts = [[row for part in parts for row in part]]
        G = torch.stack([loss_gradient(model, part) for part in parts]).double().numpy()
        inner = G @ g.double().numpy()
        self.conflicts.append(int((inner < 0).sum()))
        if (inner >= 0).all() and self.mistake != "margin without a conflict":
            return g
        n = len(G)
        bounds = np.full(n, 0.0 if self.mistake == "no margin" else self.margin)
        v = quadprog.solve_qp(G @ G.T + 1e-12 * np.eye(n), -inner, np.eye(n), bounds)[0]
        return g + torch.from_numpy(v @ G).to(g)


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
@pytest.mark.parametrize(("margin", "drawn"), [(0.0, None), (0.5, None), (0.5, 4)])
def test_equals_a_hand_written_loop(scenario: str, margin: float, drawn: int | None, tmp_path: Path) -> None:
    stream, gem = TinyStream(4, scenario=scenario, noise=1.0), make(margin=margin, batch_size=drawn)
    watched = Drawn(gem)
    experiment, recorder = run(tmp_path, "gem", gem, stream=stream)
    by_hand = ByHand(watched, stream, margin=margin, without=8)
    model = learn(recorder, by_hand)
    assert len(by_hand.conflicts) == 24
    assert {1, 2} <= set(by_hand.conflicts)
    assert 0 in by_hand.conflicts or scenario != "domain_incremental"
    close(model, experiment.learner, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mistake", ["one gradient for all", "no margin", "margin without a conflict"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    stream, gem = TinyStream(4, scenario="domain_incremental", noise=1.0), make(margin=0.5)
    watched = Drawn(gem)
    experiment, recorder = run(tmp_path, "gem", gem, stream=stream)
    model = learn(recorder, ByHand(watched, stream, margin=0.5, without=8, mistake=mistake))
    with pytest.raises(AssertionError, match="not close"):
        close(model, experiment.learner, rtol=1e-3, atol=1e-4)


def test_accumulated_and_clipped(tmp_path: Path) -> None:
    stream, gem = TinyStream(), make()
    watched = Drawn(gem)
    options: dict[str, Any] = {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}}
    experiment, recorder = run(tmp_path, "gem", gem, stream=stream, **options)
    assert len(watched.steps) == 8  # two experiences of two epochs of two steps
    model = learn(recorder, ByHand(watched, stream, margin=0.5, without=4), accumulate=2, clip=0.2)
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_earlier_experiences_share_the_memory_equally(scenario: str, tmp_path: Path) -> None:
    """Also where they have the same classes; each is drawn by itself, and as a whole."""
    stream, gem = TinyStream(scenario=scenario), make()
    watched = Drawn(gem)
    make_experiment(tmp_path, {"gem": gem}, stream=stream).run()
    assert [len(part) for part in watched.steps[0]] == [20]
    assert [len(part) for part in watched.steps[-1]] == [10, 10]
    experience_of = {int(i): e.index for e in stream for i in e.train.columns["index"]}
    for step in watched.steps:
        assert [{experience_of[i] for i in part} for part in step] == [{k} for k in range(len(step))]
    stored = gem.buffer.take(torch.arange(20))
    assert sorted(torch.bincount(stored["experience"]).tolist()) == [6, 7, 7]


def test_a_draw_is_of_each_experience_without_repetition(tmp_path: Path) -> None:
    gem = make(batch_size=4)
    watched = Drawn(gem)
    make_experiment(tmp_path, {"gem": gem}).run()
    assert all(len(set(part)) == len(part) == 4 for step in watched.steps for part in step)
    assert len({tuple(sorted(step[0])) for step in watched.steps}) > 8


def test_it_forgets_less_than_fine_tuning(tmp_path: Path) -> None:
    gem = make_experiment(tmp_path / "a", {"gem": make(capacity=96)}).run()
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}).run()
    assert gem.metrics["average_forgetting"] < plain.metrics["average_forgetting"] - 0.3  # type: ignore[operator]
