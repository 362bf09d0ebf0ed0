"""BiC: both stages against a hand-written loop, the correction against a general optimiser, and who is trained on what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Model, Recorder, samples, train
from scipy.optimize import minimize
from strategies import from_page
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyBackbone, TinyStream, make_experiment, same, weights

from clplatform import checkpoint
from clplatform.results import Results
from clplatform.strategy.base import Strategy
from clplatform.strategy.bic import ROW, BiasCorrection, BiC, divergence
from clplatform.types import Batch, Experience, ExperienceInfo, Stage

T = 2.0


def make(**changes: Any) -> BiC:
    strategy = from_page("bic", **{"capacity": 24, "held_out": 0.3, "lr": 0.05, **changes})
    assert isinstance(strategy, BiC)
    return strategy


class Watch(Recorder):
    """Beside BiC in the chain: what each stage starts from, sees and leaves."""

    family = "plugin"  # BiC shares with no baseline

    def __init__(self) -> None:
        super().__init__()
        self.of_stage: dict[tuple[int, str], list[Batch]] = {}
        self.start: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.end: dict[tuple[int, str], dict[str, Tensor]] = {}

    def before_stage(self, learner: Any, experience: Experience, stage: Stage) -> None:
        self.stage = experience.index, stage.name
        self.of_stage[self.stage], self.start[self.stage] = [], weights(learner)

    def extend_batch(self, learner: Any, batch: Batch) -> Batch:
        self.of_stage[self.stage].append(batch)
        return batch

    def after_stage(self, learner: Any, experience: Experience, stage: Stage) -> None:
        self.end[self.stage] = weights(learner)


def run(folder: Path, bic: BiC, **options: Any) -> tuple[Any, Watch]:
    watch = Watch()
    experiment = make_experiment(folder, {"watch": watch, "bic": bic}, **options)
    experiment.run()
    return experiment, watch


def model_of(state: dict[str, Tensor]) -> Model:
    return Model({name: tensor for name, tensor in state.items() if not name.startswith("extras")})


# -- both stages written out ----------------------------------------------------------------------------------------------

Layers = list[tuple[float, float]]  # α, β of each experience


def corrected(logits: Tensor, layers: Layers) -> Tensor:
    """Experience t has the classes 2t and 2t + 1."""
    parts = [alpha * logits[:, 2 * t : 2 * t + 2] + beta for t, (alpha, beta) in enumerate(layers)]
    return torch.cat([*parts, logits[:, 2 * len(layers) :]], 1)


def first_stage(
    model: Model, teacher: Model | None, batches: list[Batch], layers: Layers, n_old: int, mistake: str = ""
) -> None:
    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        q = corrected(logits, [] if mistake == "student uncorrected" else layers)
        task = F.cross_entropy(q, batch["labels"])
        if teacher is None:
            return task
        with torch.no_grad():
            then = corrected(teacher(batch["pixel_values"]), [] if mistake == "teacher uncorrected" else layers)
        n, m = n_old, q.shape[1] - n_old
        share = m / (n + m) if mistake == "shares exchanged" else n / (n + m)
        k = n - 1 if mistake == "a class too few" else n
        p = (then[:, :k] / T).softmax(1)
        distillation = (p * (p.log() - (q[:, :k] / T).log_softmax(1))).sum(1).mean()
        factor = T**2 if mistake == "T squared" else 1.0
        return (1 - share) * task + share * factor * distillation

    train(model, batches, loss)


def second_stage(model: Model, batches: list[Batch], layers: Layers, mistake: str = "") -> tuple[float, float]:
    """α and β by SGD with momentum on the logits of the model, which stays as it is."""
    alpha, beta = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([alpha, beta], lr=0.05, momentum=0.9)
    first = 2 * len(layers) - (2 if mistake == "an old task corrected too" else 0)
    for batch in batches:
        with torch.no_grad():
            q = corrected(model(batch["pixel_values"]), layers)
        q = torch.cat([q[:, :first], alpha * q[:, first:] + beta], 1)
        optimizer.zero_grad()
        F.cross_entropy(q, batch["labels"]).backward()
        optimizer.step()
    return alpha.item(), beta.item()


def learn(watch: Watch, mistake: str = "") -> tuple[Model, Layers]:
    model, layers = model_of(watch.start[0, "main"]), [(1.0, 0.0)]
    for t in range(len(watch.before)):
        teacher = copy.deepcopy(model) if t else None
        model.grow({n: x for n, x in watch.start[t, "main"].items() if not n.startswith("extras")})
        first_stage(model, teacher, watch.of_stage[t, "main"], layers, 2 * t, mistake)
        if t > 0:
            layers.append(second_stage(model, watch.of_stage[t, "bias"], layers, mistake))
    return model, layers


def gap(watch: Watch, learner: Any, mistake: str = "") -> float:
    """How far the run is from the hand-written loop."""
    model, layers = learn(watch, mistake)
    found = weights(learner)
    pairs = [(found[name], expected) for name, expected in model.named().items()]
    for name, i in (("scale", 0), ("shift", 1)):
        pairs.append((found[f"extras.bic.{name}"][::2], torch.tensor([layer[i] for layer in layers])))
        assert torch.equal(found[f"extras.bic.{name}"][::2], found[f"extras.bic.{name}"][1::2])
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_equals_a_hand_written_loop(tmp_path: Path) -> None:
    experiment, watch = run(tmp_path, make(epochs=20))
    assert gap(watch, experiment.learner) < 1e-4
    scale, shift = (weights(experiment.learner)[f"extras.bic.{name}"] for name in ("scale", "shift"))
    assert (scale[2:] - 1).abs().min() > 0.01 and shift[2:].abs().min() > 0.01  # there was something to correct


MISTAKES = [
    "student uncorrected", "teacher uncorrected", "shares exchanged", "a class too few", "T squared",
    "an old task corrected too",
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    experiment, watch = run(tmp_path, make(epochs=20))
    assert gap(watch, experiment.learner, mistake) > 1e-3


def test_distillation_is_the_written_out_divergence() -> None:
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    p, q = ((x / T).exp() / (x / T).exp().sum(1, keepdim=True) for x in (teacher, student))
    torch.testing.assert_close(divergence(student, teacher, T), (p * (p / q).log()).sum(1).mean())


def test_the_teacher_is_the_model_of_before_without_dropout(tmp_path: Path) -> None:
    bic, stream = make(), TinyStream()
    experiment, watch = run(tmp_path, bic, stream=stream, dropout=0.5)
    batch, before = stream[2].train.fetch(torch.arange(32)), watch.after[1]
    scale, shift = (before[f"extras.bic.{name}"][:4] for name in ("scale", "shift"))
    state = {n: t[:4] if n.startswith("head") else t for n, t in before.items()}
    assert bic.teacher is not None
    # Recorded before BiC folds the layer of that experience into those before it.
    layer = before["extras.bic.alpha"], before["extras.bic.beta"]
    expected = model_of(state)(batch["pixel_values"]) * scale + shift
    expected[:, 2:] = expected[:, 2:] * layer[0] + layer[1]
    experiment.learner.train()
    torch.testing.assert_close(bic.teacher(batch).logits[:, :4], expected)


# -- the correction -------------------------------------------------------------------------------------------------------


def test_stage_two_trains_alpha_and_beta_and_nothing_else(tmp_path: Path) -> None:
    """No weight, no statistics of batch-norm, whatever the optimizer's momentum and weight decay."""

    class Normalised(TinyBackbone):
        def __init__(self) -> None:
            super().__init__(0.5)
            self.norm = nn.BatchNorm1d(self.feature_size)

        def forward(self, batch: Batch) -> Tensor:
            return self.dropout(self.norm(self.layer(batch["pixel_values"].flatten(1))))

    adam = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.5)
    _, watch = run(tmp_path, make(), backbone=Normalised(), optimizer=adam)
    assert [t for t, name in watch.end if name == "bias"] == [1, 2]
    for t in (1, 2):
        start, end = watch.start[t, "bias"], watch.end[t, "bias"]
        changed = {name for name in start if not torch.equal(start[name], end[name])}
        assert changed == {"extras.bic.alpha", "extras.bic.beta"}
        assert same(watch.end[t, "main"], start)
        assert start["extras.bic.alpha"] == 1 and start["extras.bic.beta"] == 0
        trained = {n for n in start if not torch.equal(watch.start[t, "main"][n], start[n])}
        assert not any(name.startswith("extras") for name in trained)
        assert {"backbone.layer.weight", "head.linear.weight"} <= trained


def test_it_is_the_best_on_the_held_out_samples(tmp_path: Path) -> None:
    """Many epochs end where a general optimiser ends, in eval mode and on samples as they were before augmentation."""

    def noise(batch: Batch, generator: torch.Generator) -> Batch:
        return {**batch, "pixel_values": batch["pixel_values"] + torch.randn(batch["pixel_values"].shape)}

    bic, stream = make(epochs=400), TinyStream(2, noise=4.0)
    experiment, watch = run(tmp_path, bic, stream=stream, dropout=0.5, augment=noise)
    (x, y) = (watch.of_stage[1, "bias"][0][name] for name in ("pixel_values", "labels"))
    assert len(watch.of_stage[1, "bias"]) == 400  # all samples in one batch
    logits = model_of(watch.end[1, "main"])(x).detach().double()

    def loss(values: Any) -> float:
        q = torch.cat([logits[:, :2], values[0] * logits[:, 2:] + values[1]], 1)
        return F.cross_entropy(q, y).item()

    best = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10})
    found = [float(weights(experiment.learner)[f"extras.bic.{name}"][3]) for name in ("scale", "shift")]
    assert loss(found) < loss([1.0, 0.0]) - 1e-3
    assert found == pytest.approx(best.x.tolist(), abs=0.02)


def test_layers_chain_and_masked_logits_stay_masked() -> None:
    torch.manual_seed(0)
    layer, logits = BiasCorrection(), torch.randn(3, 4)
    layer.grow(ExperienceInfo(0, "e1", 0, (0, 1), 2))
    layer.fold()
    layer.grow(ExperienceInfo(1, "e2", 0, (2, 3), 4))
    with torch.no_grad():
        layer.alpha.fill_(0.5), layer.beta.fill_(-1)
    first = torch.cat([logits[:, :2], 0.5 * logits[:, 2:] - 1], 1)
    torch.testing.assert_close(layer(logits), first)
    layer.fold()
    torch.testing.assert_close(layer(logits), first)
    layer.grow(ExperienceInfo(2, "e3", 0, (1, 2), 4))  # classes that come back
    with torch.no_grad():
        layer.alpha.fill_(-2), layer.beta.fill_(3)
    second = torch.cat([first[:, :1], -2 * first[:, 1:3] + 3, first[:, 3:]], 1)
    torch.testing.assert_close(layer(logits), second)
    layer.fold()
    layer.grow(ExperienceInfo(2, "e3", 0, (1, 2), 4))  # idempotent
    torch.testing.assert_close(layer(logits), second)
    masked = logits.clone()
    masked[:, [0, 2]] = -1e4
    assert (layer(masked)[:, [0, 2]] == -1e4).all()


def test_predictions_are_corrected(tmp_path: Path) -> None:
    stream = TinyStream()
    experiment, _ = run(tmp_path, make(), stream=stream)
    learner: Any = experiment.learner.eval()
    batch, state = stream[1].test.fetch(torch.arange(16)), weights(learner)
    expected = model_of(state)(batch["pixel_values"]) * state["extras.bic.scale"] + state["extras.bic.shift"]
    torch.testing.assert_close(learner(batch).logits, expected)


# -- who is trained on what -----------------------------------------------------------------------------------------------


def indices(batches: list[Batch]) -> list[int]:
    return torch.cat([b["index"] for b in batches]).tolist() if batches else []


def test_what_is_held_out_is_never_trained_on_but_in_stage_two(tmp_path: Path) -> None:
    stream, bic = TinyStream(), make()
    _, watch = run(tmp_path, bic, stream=stream)
    trained: set[int] = set()
    for t in range(3):
        trained |= set(indices(watch.of_stage[t, "main"]))
        held = set(indices(watch.of_stage.get((t, "bias"), [])))
        assert not trained & held
        assert (t > 0) == bool(held)
    assert all(ROW not in b for b in watch.of_stage[2, "main"])
    rows = bic.buffer.take(torch.arange(24))
    for i, out in zip(rows["index"].tolist(), rows["held_out"].tolist(), strict=True):
        assert out == (i not in trained)


def test_stages_have_the_samples_they_should(tmp_path: Path) -> None:
    """Capacity 24, of which ⌈0.3 · share⌉ of each class are held out: 4 of 12, 2 of 6, 2 of 4."""
    stream, bic = TinyStream(), make()
    memory: list[dict[int, tuple[int, bool]]] = [{}]

    class After(Strategy):
        family = "plugin"

        def after_experience(self, learner: Any, experience: Experience) -> None:
            rows = bic.buffer.take(torch.arange(24))
            columns = (rows[name].tolist() for name in ("index", "labels", "held_out"))
            memory.append({i: (y, out) for i, y, out in zip(*columns, strict=True)})

    watch = Watch()
    make_experiment(tmp_path, {"watch": watch, "bic": bic, "after": After()}, stream=stream).run()
    label_of = {i: y for i, (_, y) in samples(stream).items()}
    for t, (share, held) in enumerate([(12, 4), (6, 2), (4, 2)]):
        new, before = set(stream[t].train.columns["index"].tolist()), memory[t]
        epoch = indices(watch.of_stage[t, "main"])[: len(watch.of_stage[t, "main"]) * 8 // 2]
        epoch = epoch[: len(set(epoch))]
        trained_new = new & set(epoch)
        assert len(trained_new) == 32 - 2 * held
        assert set(epoch) - new == {i for i, (_, out) in before.items() if not out}
        assert len(epoch) == len(set(epoch))
        if t > 0:
            second = watch.of_stage[t, "bias"]
            one_epoch = set(indices(second))
            assert len(indices(second)) == 5 * len(one_epoch)
            counts = [sum(label_of[i] == c for i in one_epoch) for c in range(2 * t + 2)]
            assert counts == [held] * (2 * t + 2)
            assert one_epoch & new == new - trained_new
            # Of the old classes those that are held out from now on, too.
            assert one_epoch - new == {i for i, (y, out) in memory[t + 1].items() if out and y < 2 * t}
        for c in range(2 * t + 2):
            of_class = [out for y, out in memory[t + 1].values() if y == c]
            assert (len(of_class), sum(of_class)) == (share, held)
        # What stays is what was first: of the old classes nothing new, and in order.
        old = {i: row for i, row in memory[t + 1].items() if row[0] < 2 * t}
        assert old.items() <= before.items()


def test_without_old_classes_there_is_one_stage_and_no_distillation(tmp_path: Path) -> None:
    bic = make()
    experiment, watch = run(tmp_path, bic, stream=TinyStream(scenario="domain_incremental"))
    assert {name for _, name in watch.of_stage} == {"main"}
    learner: Any = experiment.learner.train()
    batch = watch.of_stage[2, "main"][0]
    output = learner(batch)
    assert bic.loss(learner, batch, output) == {}
    assert torch.equal(bic.task_loss(learner, batch, output), F.cross_entropy(output.logits, batch["labels"]))


# -- around it ------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("batch", [20, 37, 40, 41])
def test_a_run_that_is_killed_in_stage_two_goes_on_to_the_same_bits(batch: int, tmp_path: Path) -> None:
    """6 batches in the first experience, 12 and 5 in the second's stages, 12 and 10 in the third's (2 in an epoch)."""

    def experiment(folder: str, stop: int | None) -> Any:
        made = make_experiment(tmp_path / folder, {"bic": make(epochs=5)}, dropout=0.2, fitter={"checkpoint_every": 1})
        count = 0

        def kill(*_: Any) -> None:
            nonlocal count
            count += 1
            if count == stop:
                raise Killed

        made.fitter.after_batch = kill
        return made

    whole, killed = experiment("whole", None), experiment("killed", batch)
    whole.run()
    with pytest.raises(Killed):
        killed.run()
    assert killed.learner.position == ((1, 1) if batch == 20 else (2, 1))
    # A checkpoint of stage two itself, or one of the end of stage one.
    position = checkpoint.load(killed.checkpoints / "step.ckpt")["clplatform"]["position"]
    assert (position == [2, 1]) == (batch > 20)
    again = experiment("killed", None)
    again.results = Results.load(tmp_path / "killed")
    again.run(resume=True)
    assert again.results.matrix == whole.results.matrix
    assert same(weights(again.learner), weights(whole.learner))


def test_stage_two_makes_no_pass_of_the_backbone(tmp_path: Path) -> None:
    short, long = (run(tmp_path / str(n), make(epochs=n))[0].learner for n in (1, 50))
    assert short.counts()["flops"] == long.counts()["flops"]
    assert long.counts()["steps"] > short.counts()["steps"] + 90


@pytest.mark.parametrize("other", ["ewc", "si", "a_gem", "gem", "mas"])
def test_others_in_the_chain_live_through_stage_two(other: str, tmp_path: Path) -> None:
    for i, names in enumerate((("bic", other), (other, "bic"))):
        strategies: dict[str, Callable[[], Strategy]] = {"bic": make, other: partial(from_page, other)}
        results = make_experiment(tmp_path / str(i), {name: strategies[name]() for name in names}).run()
        assert results.matrix[3][2] > 0.5  # type: ignore[operator]


def test_it_forgets_less_than_fine_tuning(tmp_path: Path) -> None:
    bic = make_experiment(tmp_path / "a", {"bic": make(epochs=50)}).run()
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}).run()
    assert bic.metrics["average_forgetting"] < 0.15  # type: ignore[operator]
    assert bic.metrics["average_accuracy"] > plain.metrics["average_accuracy"] + 0.2  # type: ignore[operator]
