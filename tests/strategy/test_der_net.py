"""DER: both stages against hand-written loops, what is frozen, and what stage 2 is trained on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exemplars import brute_force
from naive import Recorder
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, tiny_vit, weights

from clplatform.strategy.base import Chain
from clplatform.strategy.der_net import ROW, DERNet
from clplatform.types import Experience, Stage

LAMBDA, DELTA = 0.6, 3.0
W, B = "backbone.layer.weight", "backbone.layer.bias"
HEAD, HEAD_B = "extras.der_net.classifier.weight", "extras.der_net.classifier.bias"
AUX, AUX_B = "extras.der_net.auxiliary.weight", "extras.der_net.auxiliary.bias"


def make(**changes: Any) -> DERNet:
    strategy = from_page("der_net", **{"auxiliary": LAMBDA, "temperature": DELTA, **changes})
    assert isinstance(strategy, DERNet)
    return strategy


class Watch(Recorder):
    """Weights and batches of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.start: list[dict[str, Tensor]] = []  # stage by stage
        self.end: list[dict[str, Tensor]] = []
        self.names: list[str] = []
        self.of_stage: list[list[dict[str, Tensor]]] = []

    def before_stage(self, learner: Any, experience: Experience, stage: Stage) -> None:
        self.start.append(weights(learner))
        self.names.append(stage.name)
        self.batches.append([])

    def after_stage(self, learner: Any, experience: Experience, stage: Stage) -> None:
        self.end.append(weights(learner))
        self.of_stage.append(self.batches.pop())


def learn(folder: Path, **options: Any) -> tuple[Any, Watch]:
    watch = Watch()
    options.setdefault("stream", TinyStream())
    chain = {"der_net": make(**options.pop("der_net", {})), "watch": watch}
    experiment = make_experiment(folder, chain, **options)
    experiment.run()
    return experiment, watch


def stages(watch: Watch, name: str) -> list[tuple[int, dict[str, Tensor], dict[str, Tensor], list[Any]]]:
    """Experience, start, end and batches of each stage of this name."""
    found, i = [], -1
    for n, start, end, batches in zip(watch.names, watch.start, watch.end, watch.of_stage, strict=True):
        i += n == "representation"
        if n == name:
            found.append((i, start, end, batches))
    return found


def features(w: dict[str, Tensor], x: Tensor, i: int) -> Tensor:
    """u [B, 16 (i + 1)]."""
    own = [(x @ w[f"extras.der_net.earlier.{j}.layer.weight"].T + w[f"extras.der_net.earlier.{j}.layer.bias"]).tanh()
           for j in range(i)]  # fmt: skip
    return torch.cat([*own, (x @ w[W].T + w[B]).tanh()], 1)


# -- stage 1 ------------------------------------------------------------------------------------------------------------


def representation(w: dict[str, Tensor], batches: list[Any], i: int, classes: tuple[int, ...], mistake: str) -> Any:
    """SGD with momentum over F_t, H_t and the auxiliary classifier."""
    names = [W, B, HEAD, HEAD_B, *([AUX, AUX_B] if i else [])]
    momentum = {n: torch.zeros_like(w[n]) for n in names}
    for batch in batches:
        w = {n: v.detach().requires_grad_(n in names) for n, v in w.items()}
        u = features(w, batch["pixel_values"].flatten(1), i)
        loss = F.cross_entropy(u @ w[HEAD].T + w[HEAD_B], batch["labels"])
        if i and mistake != "no auxiliary loss":
            target = torch.tensor([classes.index(y) if y in classes else 2 for y in batch["labels"].tolist()])
            seen = u if mistake == "old features" else u[:, -16:]
            auxiliary = seen[:, :16] @ w[AUX].T + w[AUX_B]
            if mistake == "old classes left out":
                auxiliary, target = auxiliary[target < 2][:, :2], target[target < 2]
            loss = loss + LAMBDA * F.cross_entropy(auxiliary, target)
        gradients = torch.autograd.grad(loss, [w[n] for n in names], allow_unused=True)
        for n, g in zip(names, gradients, strict=True):
            momentum[n] = 0.9 * momentum[n] + (0 if g is None else g)
            w[n] = w[n].detach() - 0.1 * momentum[n]
    return {n: v.detach() for n, v in w.items()}


def test_stage_one_equals_a_hand_written_loop(tmp_path: Path) -> None:
    experiment, watch = learn(tmp_path)
    found = stages(watch, "representation")
    assert len(found) == 3
    for i, start, end, batches in found:
        expected = representation(start, batches, i, experiment.stream[i].classes, "")
        for name, value in expected.items():
            torch.testing.assert_close(end[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mistake", ["no auxiliary loss", "old features", "old classes left out"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    experiment, watch = learn(tmp_path)
    i, start, end, batches = stages(watch, "representation")[2]
    expected = representation(start, batches, i, experiment.stream[i].classes, mistake)
    assert not torch.allclose(end[AUX], expected[AUX], rtol=1e-2, atol=1e-3)


def test_an_epoch_is_the_new_data_and_the_memory(tmp_path: Path) -> None:
    experiment, watch = learn(tmp_path)
    for i, _, _, batches in stages(watch, "representation"):
        assert len(batches) == 2 * (4 if i == 0 else 7)  # 32 samples, and 20 of the memory, by 8
        new = set(experiment.stream[i].train.columns["index"].tolist())
        epoch = torch.cat([b["index"] for b in batches[: len(batches) // 2]]).tolist()
        assert len(epoch) == len(set(epoch)) and new <= set(epoch)


# -- stage 2 ------------------------------------------------------------------------------------------------------------


def classifier(w: dict[str, Tensor], batches: list[Any], i: int, mistake: str = "") -> dict[str, Tensor]:
    w = {n: v.clone() for n, v in w.items()}
    momentum = {n: torch.zeros_like(w[n]) for n in (HEAD, HEAD_B)}
    for batch in batches:
        u = features(w, batch["pixel_values"].flatten(1), i)
        p = ((u @ w[HEAD].T + w[HEAD_B]) / (1 if mistake else DELTA)).softmax(1)
        gap = (p - F.one_hot(batch["labels"], p.shape[1])) / len(p) / (1 if mistake else DELTA)
        for n, g in ((HEAD, gap.T @ u), (HEAD_B, gap.sum(0))):
            momentum[n] = 0.9 * momentum[n] + g
            w[n] = w[n] - 0.1 * momentum[n]
    return w


def test_stage_two_equals_a_hand_written_loop_over_the_classifier_alone(tmp_path: Path) -> None:
    """By the gradient in closed form, on features without dropout."""
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.0)
    _, watch = learn(tmp_path, dropout=0.4, optimizer=optimizer)
    found = stages(watch, "classifier")
    assert [i for i, *_ in found] == [1, 2]
    for i, start, end, batches in found:
        expected = classifier(start, batches, i)
        for name, value in expected.items():
            if name in (HEAD, HEAD_B):
                torch.testing.assert_close(end[name], value, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(end[name], value), name
        wrong = classifier(start, batches, i, "no temperature")
        assert not torch.allclose(end[HEAD], wrong[HEAD], rtol=1e-2, atol=1e-3)


def test_stage_two_has_as_many_samples_of_each_class_and_new_weights(tmp_path: Path) -> None:
    experiment, watch = learn(tmp_path)
    ends = {i: end for i, _, end, _ in stages(watch, "representation")}
    for i, start, _, batches in stages(watch, "classifier"):
        assert not (start[HEAD] == ends[i][HEAD]).any()
        n_epochs = 3
        per_epoch = len(batches) // n_epochs
        rows = {n: torch.cat([b[n] for b in batches[:per_epoch]]) for n in ("labels", "index", ROW)}
        n = 20 // (2 * i)
        assert rows["labels"].bincount().tolist() == [n] * (2 * i + 2)
        assert sorted(rows[ROW].tolist()) == list(range(n * (2 * i + 2)))
        assert len(rows["index"].unique()) == len(rows["index"])
        old = rows["labels"] < 2 * i
        assert set(rows["index"][~old].tolist()) <= set(experiment.stream[i].train.columns["index"].tolist())


def test_the_memory_is_chosen_by_herding_over_all_features(tmp_path: Path) -> None:
    experiment, watch = learn(tmp_path, stream=TinyStream(2, noise=1.0))
    buffer, end = experiment.learner.chain.strategies["der_net"].buffer, watch.after[-1]
    batch = experiment.stream[1].train.fetch(torch.arange(32))
    u = features(end, batch["pixel_values"].flatten(1), 1)
    for c in (2, 3):
        own = (batch["labels"] == c).nonzero()[:, 0]
        expected = batch["index"][own[brute_force(u[own], 5)]]
        assert set(buffer.column("index")[buffer.labels == c].tolist()) == set(expected.tolist())


# -- structure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["tiny", "vit"])
def test_earlier_backbones_stay_to_the_bit(backbone: str, tmp_path: Path) -> None:
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    chosen = tiny_vit() if backbone == "vit" else None
    experiment, watch = learn(tmp_path, optimizer=optimizer, backbone=chosen, dropout=0.3)
    end = watch.after[-1]
    for t, state in enumerate(watch.after[:-1]):
        for name, value in state.items():
            if name.startswith("backbone."):
                assert torch.equal(end[name.replace("backbone.", f"extras.der_net.earlier.{t}.")], value), name
                assert torch.equal(watch.before[t + 1][name], value)  # the next one starts from there
    learner = experiment.learner.train()
    own = learner.extras["der_net"]
    assert learner.backbone.training and not any(m.training for m in own.earlier.modules())
    assert not any(p.requires_grad for p in own.earlier.parameters())
    batch = experiment.stream[0].test.fetch(torch.arange(16))
    assert learner.eval()(batch).features.shape == (16, 48)


def test_the_classifier_takes_over_what_there_was(tmp_path: Path) -> None:
    _, watch = learn(tmp_path)
    for t in range(2):
        old, new = watch.after[t], watch.before[t + 1]
        k, d = old[HEAD].shape
        assert new[HEAD].shape == (k + 2, d + 16)
        assert torch.equal(new[HEAD][:k, :d], old[HEAD])
        assert torch.equal(new[HEAD_B][:k], old[HEAD_B])
        assert new[AUX].shape == (3, 16)


@pytest.mark.parametrize("scenario", ["task_incremental", "domain_incremental"])
def test_other_scenarios(scenario: str, tmp_path: Path) -> None:
    stream = TinyStream(scenario=scenario)
    experiment, watch = learn(tmp_path, stream=stream)
    assert all(value is not None and value > 0.7 for value in experiment.results.matrix[-1])
    if scenario == "task_incremental":
        with torch.no_grad():
            batch = stream[1].test.fetch(torch.arange(16))
            logits = experiment.learner.eval()(batch).logits
        assert ((logits > -5000).nonzero()[:, 1].view(16, 2) == torch.tensor([2, 3])).all()
    else:
        for i, _, _, batches in stages(watch, "classifier"):
            labels = torch.cat([b["labels"] for b in batches[: len(batches) // 3]])
            assert labels.bincount().tolist() == [20, 20], i  # ten of the memory and ten new ones


def test_structure_is_idempotent_and_its_cost_is_counted(tmp_path: Path) -> None:
    stream, strategy = TinyStream(), make()
    learner = make_experiment(tmp_path, {"der_net": strategy}, stream=stream).learner
    for i, e in enumerate(stream):
        learner.build(e.info)
        before = weights(learner)
        learner.build(e.info)
        assert all(torch.equal(v, before[n]) for n, v in weights(learner).items())
        extra = i * (12 * 16 + 16) + (2 * i + 2) * (16 * (i + 1) + 1) + (3 * 17 if i else 0)
        assert strategy.cost()["extra_parameters"] == extra


def test_is_combined_with_nothing() -> None:
    for other in ("replay", "ewc", "lwf", "finetuning", "packnet", "ncm"):
        with pytest.raises(ValueError, match="cannot be combined"):
            Chain({other: from_page(other), "der_net": make()})
