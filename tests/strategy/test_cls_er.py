"""CLS-ER against a hand-written loop with a reservoir and two averages of its own, and who answers when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import averages
import pytest
import torch
from averages import Breaks, Follower, scale_losses
from composed import trained
from naive import Memory, Model, Recorder, samples
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, weights

import clplatform
from clplatform.strategy.cls_er import CLSER
from clplatform.types import Batch

STRENGTH, PLASTIC, STABLE = 0.4, 0.7, 0.95


def make(**changes: Any) -> CLSER:
    values = {"strength": STRENGTH, "plastic_decay": PLASTIC, "stable_decay": STABLE, "batch_size": 5, **changes}
    strategy = from_page("cls_er", **values)
    assert isinstance(strategy, CLSER)
    return strategy


class Chances(Recorder):
    """Before CLS-ER in the chain: the two numbers that it is about to draw after a step."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[list[float]] = []

    def after_step(self, learner: Any) -> None:
        twin = torch.Generator()
        twin.set_state(learner.generator.get_state())
        self.drawn.append(torch.rand(2, generator=twin).tolist())


class Run:
    """A run with everything a hand-written loop needs to know."""

    def __init__(self, folder: Path, stream: TinyStream | None = None, **changes: Any) -> None:
        self.stream, self.cls_er, self.chances = stream or TinyStream(2), make(**changes), Chances()
        self.memory = Memory(self.cls_er.buffer)
        chain = {"chances": self.chances, "cls_er": self.cls_er}
        self.experiment = make_experiment(folder, chain, stream=self.stream)
        self.experiment.run()
        self.learner: Any = self.experiment.learner

    def by_hand(self, mistake: str = "") -> tuple[Model, Follower, Follower]:
        """Working, plastic and stable model; `mistake`: a usual one."""
        draws, chances, known = iter(self.memory.draws), iter(self.chances.drawn), samples(self.stream)
        by_task = self.stream.info.scenario == "task_incremental"
        model, steps = Model(self.chances.before[0]), 0
        warm_up = mistake != "no warm-up"
        plastic, stable = (Follower(model, decay, warm_up=warm_up) for decay in (PLASTIC, STABLE))

        def cut(z: Tensor, label: int) -> Tensor:
            """The logits of a sample's own task, or all."""
            return z[label // 2 * 2 : label // 2 * 2 + 2] if by_task else z

        def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
            labels = batch["labels"].tolist()
            terms = [F.cross_entropy(cut(z, y), torch.tensor(place(y))) for z, y in zip(logits, labels, strict=True)]
            if steps == 0:
                return torch.stack(terms).mean()
            x, y = zip(*(known[self.memory.index[v]] for v in next(draws)), strict=True)
            now, fast, slow = (m(torch.stack(x)) for m in (model, plastic, stable))
            gaps = []
            for z, p, s, label in zip(now, fast, slow, y, strict=True):
                terms.append(F.cross_entropy(cut(z, label), torch.tensor(place(label))))
                sure_p, sure_s = (cut(t, label).softmax(0)[place(label)] for t in (p, s))
                takes_stable = {"always stable": True, "the less sure": bool(sure_s < sure_p)}.get(
                    mistake, bool(sure_s > sure_p)
                )
                gaps.append(cut(z, label) - cut(s if takes_stable else p, label))
            return torch.stack(terms).mean() + STRENGTH * torch.cat(gaps).pow(2).mean()

        def place(label: int) -> int:
            return label % 2 if by_task else label

        def update() -> None:
            fast, slow = next(chances)
            if fast < self.cls_er.rates[0]:
                plastic.update(model, steps + 1)
            if slow < self.cls_er.rates[1]:
                stable.update(model, steps + 1)

        def before() -> None:
            if mistake == "before the step":
                update()

        def after() -> None:
            nonlocal steps
            if mistake != "before the step":
                update()
            steps += 1

        for start, batches in zip(self.chances.before, self.chances.batches, strict=True):
            for part in (model, plastic, stable):
                part.grow(start) if isinstance(part, Model) else part.grow(model, start)
            averages.train(model, batches, loss, before=before, after=after)
        assert next(draws, None) is None
        return model, plastic, stable

    def check(self, mistake: str = "") -> None:
        model, plastic, stable = self.by_hand(mistake)
        found = {n: t for n, t in weights(self.learner).items() if not n.startswith("extras")}
        for name, value in model.named().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        for follower, average in zip((plastic, stable), self.cls_er.averages(self.learner), strict=True):
            averages.close(follower.model, average)


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.6, 0.3), (0.5, 0.0)])
def test_equals_a_hand_written_loop(scenario: str, rates: tuple[float, float], tmp_path: Path) -> None:
    run = Run(tmp_path, TinyStream(2, scenario=scenario), plastic_rate=rates[0], stable_rate=rates[1])
    run.memory.check(5)
    assert len(run.memory.keys) == 2 * 2 * 32  # every visit competes, and replayed rows do not
    run.check()
    for average, rate, i in zip(run.cls_er.averages(run.learner), rates, (0, 1), strict=True):
        assert sum(chances[i] < rate for chances in run.chances.drawn) > 0 or rate == 0
        same = torch.equal(average.backbone.layer.weight, run.chances.before[0]["backbone.layer.weight"])
        assert same == (rate == 0)


@pytest.mark.parametrize("mistake", ["before the step", "no warm-up", "always stable", "the less sure"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    run = Run(tmp_path, plastic_rate=1.0, stable_rate=0.8)
    with pytest.raises(AssertionError, match="not close"):
        run.check(mistake)


def test_both_averages_teach(tmp_path: Path) -> None:
    run = Run(tmp_path, TinyStream(3, noise=1.0), plastic_rate=1.0, stable_rate=1.0)
    batch = run.cls_er.buffer.take(torch.arange(20))
    plastic, stable = (average(run.learner, batch).logits for average in run.cls_er.averages(run.learner))
    target = run.cls_er.target(run.learner, batch)
    from_stable = (target == stable).all(1)
    assert 0 < from_stable.sum() < 20
    for row, (p, s, y) in enumerate(zip(plastic, stable, batch["labels"].tolist(), strict=True)):
        assert from_stable[row] == (s.softmax(0)[y] > p.softmax(0)[y])
        assert torch.equal(target[row], s if from_stable[row] else p)


# -- the averages ----------------------------------------------------------------------------------------------------------


def test_the_averages_have_no_dropout_while_the_model_trains(tmp_path: Path) -> None:
    cls_er = make(stable_rate=0.6)
    learner: Any = make_experiment(tmp_path, {"cls_er": cls_er}, dropout=0.5).learner
    stream = TinyStream()
    learner.build(stream[0].info)
    learner.train()
    batch = stream[0].train.fetch(torch.arange(32))
    x = batch["pixel_values"]
    for average in cls_er.averages(learner):
        plain = Model(averages.averaged(average))  # which has no dropout at all
        torch.testing.assert_close(average(learner, batch).logits, plain(x))
    assert not torch.equal(learner(batch).logits, learner(batch).logits)


def test_a_skipped_step_moves_no_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_losses(monkeypatch)
    cls_er = make(plastic_rate=1.0, stable_rate=1.0)
    breaks = Breaks(6, lambda learner: list(cls_er.averages(learner)))
    experiment = make_experiment(tmp_path, {"cls_er": cls_er, "breaks": breaks}, stream=TinyStream(1))
    experiment.run()
    assert experiment.learner.steps == 7
    for i, (before, after) in enumerate(zip(breaks.seen, breaks.seen[1:], strict=False)):
        for then, now in zip(before, after, strict=True):
            moved = any(not torch.equal(now[n], then[n]) for n in then)
            assert moved == (i + 2 != 6), i


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    chances, cls_er = Chances(), make()
    chain = {"chances": chances, "cls_er": cls_er}
    experiment = make_experiment(tmp_path, chain, trainer={"accumulate_grad_batches": 2}, stream=TinyStream(2))
    experiment.run()
    assert len(chances.drawn) == experiment.learner.steps == 8


# -- who answers --------------------------------------------------------------------------------------------------------------


def test_the_stable_model_predicts_and_the_working_model_trains(tmp_path: Path) -> None:
    run = Run(tmp_path)
    learner, batch = run.learner, run.stream[1].test.fetch(torch.arange(16))
    x = batch["pixel_values"]
    _, stable = (Model(averages.averaged(average)) for average in run.cls_er.averages(learner))
    working = Model({n: t for n, t in weights(learner).items() if not n.startswith("extras")})
    assert not torch.allclose(working(x), stable(x), atol=1e-3)
    learner.eval()
    with torch.no_grad():
        torch.testing.assert_close(learner(batch).logits, stable(x))
    torch.testing.assert_close(learner(batch).logits, working(x))  # gradients are of the working model
    learner.train()
    torch.testing.assert_close(learner(batch).logits, working(x))
    with torch.no_grad():
        torch.testing.assert_close(learner(batch).logits, working(x))
    parts = {id(learner.backbone), id(learner.head)}
    assert not parts & {id(m) for m in learner.extras.modules()}


def test_what_is_evaluated_is_the_stable_model(tmp_path: Path) -> None:
    run = Run(tmp_path)
    _, stable = (Model(averages.averaged(average)) for average in run.cls_er.averages(run.learner))
    for experience, found in zip(run.stream, run.experiment.results.matrix[-1], strict=True):
        batch = experience.test.fetch(torch.arange(len(experience.test)))
        expected = (stable(batch["pixel_values"]).argmax(1) == batch["labels"]).float().mean()
        assert found == pytest.approx(expected.item())


def test_a_saved_model_predicts_with_the_stable_weights(tmp_path: Path) -> None:
    overrides = ["backbone=mlp", "backbone.hidden=[16]", "strategy=cls_er", "stream.n_experiences=2"]
    run = trained(tmp_path, *overrides, "strategy.cls_er.stable_rate=0.5")
    predictor = clplatform.load(tmp_path)
    batch = run.stream[1].test.fetch(torch.arange(30))
    learner: Any = run.learner
    cls_er: Any = next(iter(learner.chain))
    found = predictor.logits(batch["pixel_values"].numpy())
    stable = cls_er.averages(learner)[1](learner, batch).logits
    working = learner.run(batch).logits
    assert torch.equal(found, stable)
    assert not torch.allclose(found, working, atol=1e-4)


def test_mir_asks_the_working_model(tmp_path: Path) -> None:
    """Whose step it foresees; it does so without gradients and without dropout, like an evaluation."""
    mir: Any = from_page("mir")
    stream = TinyStream(2)
    experiment = make_experiment(tmp_path, {"cls_er": make(), "mir": mir}, stream=stream)
    experiment.run()
    learner: Any = experiment.learner
    learner.train()
    batch, rows = (e.train.fetch(torch.arange(8)) for e in (stream[1], stream[0]))
    found = mir.interference(learner, batch, rows)
    model = Model({n: t for n, t in weights(learner).items() if not n.startswith("extras")})
    before = F.cross_entropy(model(rows["pixel_values"]), rows["labels"], reduction="none")
    F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p -= 0.1 * p.grad
    after = F.cross_entropy(model(rows["pixel_values"]), rows["labels"], reduction="none")
    torch.testing.assert_close(found, after - before)


def test_the_state_holds_the_plastic_and_the_model_the_stable(tmp_path: Path) -> None:
    run = Run(tmp_path)
    plastic, stable = run.cls_er.averages(run.learner)
    saved = weights(run.learner)
    for name, value in stable.state_dict().items():
        assert torch.equal(saved[f"extras.cls_er.{name}"], value)
    for name, value in plastic.state_dict().items():
        assert torch.equal(run.cls_er.state_dict()["plastic"][name], value)
    assert len(saved) == 2 * len(stable.state_dict())
