"""Progressive networks: the equations written out, a hand-written training loop, and columns that never change."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Recorder
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from torch.nn import functional as F
from world import DIM, TinyStream, make_experiment, make_learner, tiny_vit

from clplatform.backbone.mlp import MLP
from clplatform.strategy.pnn import PNN
from clplatform.types import Batch, ClplatformError, InputSpec

KINDS = ["linear", "adapter"]
HIDDEN = [9, 16]
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
}


def make(**changes: Any) -> PNN:
    strategy = from_page("pnn", **changes)
    assert isinstance(strategy, PNN)
    return strategy


def perceptron(dropout: float = 0.0) -> MLP:
    torch.manual_seed(0)
    spec = InputSpec("image", shape=(1, 1, DIM), mean=(0.0,), std=(1.0,))
    return MLP(input=spec, name="mlp", hidden=HIDDEN, dropout=dropout, freeze="none")


def samples_of(stream: Any) -> list[Batch]:
    return [e.test.fetch(torch.arange(len(e.test))) for e in stream]


def learn(folder: Path, kind: str, *, make_one: Any = make_experiment, **options: Any) -> tuple[Any, Recorder, Any]:
    """A run, what it saw, and the test logits of the tasks seen after each experience."""
    stream = options.pop("stream", None) or TinyStream(scenario="task_incremental")
    recorder, answers = Recorder(), []
    chain = {"pnn": make(lateral=kind), "recorder": recorder}
    experiment = make_one(folder, chain, stream=stream, **options)
    record = experiment._record

    def spying(experience: Any, times: Any) -> None:
        learner = experiment.learner.eval()
        with torch.no_grad():
            answers.append([learner(b).logits for b in samples_of(stream)[: len(learner.seen)]])
        record(experience, times)

    experiment._record = spying
    experiment.run()
    return experiment, recorder, answers


# -- the equations ------------------------------------------------------------------------------------------------------


def column_weights(w: dict[str, Tensor], k: int, last: int) -> dict[str, Tensor]:
    prefix = "backbone." if k == last else f"extras.pnn.columns.{k}."
    return {n.removeprefix(prefix): v for n, v in w.items() if n.startswith(prefix)}


def lateral(w: dict[str, Tensor], prefix: str, earlier: list[Tensor]) -> Tensor:
    """a, from blocks of U and of V: one for each earlier column."""
    u = w[f"{prefix}.u.weight"]
    if f"{prefix}.v.weight" not in w:
        return sum(h @ block.T for h, block in zip(earlier, u.chunk(len(earlier), 1), strict=True))  # type: ignore[return-value]
    blocks, alpha = w[f"{prefix}.v.weight"].chunk(len(earlier), 1), w[f"{prefix}.alpha"]
    hidden = sum(a * (h @ block.T) for a, h, block in zip(alpha, earlier, blocks, strict=True))
    return hidden.clamp_min(0) @ u.T  # type: ignore[union-attr]


def logits_of(w: dict[str, Tensor], x: Tensor, k: int, last: int, mistake: str = "") -> Tensor:
    """Logits [B, 2] of experience k, from all columns up to it."""
    columns: list[list[Tensor]] = []
    for j in range(k + 1):
        own, h, states = column_weights(w, j, last), x.flatten(1), []
        for layer in range(len(HIDDEN)):
            z = h @ own[f"layers.{layer}.0.weight"].T + own[f"layers.{layer}.0.bias"]
            if layer and j and mistake != "no connections":
                z = z + lateral(w, f"extras.pnn.laterals.{j - 1}.blocks.{layer - 1}", [c[layer - 1] for c in columns])
            h = z.clamp_min(0)
            states.append(h)
        columns.append(states)
    rows = slice(2 * k, 2 * k + 2)
    logits = h @ w["head.linear.weight"][rows].T + w["head.linear.bias"][rows]
    if k and mistake != "not in the classifier":
        logits = logits + lateral(w, f"extras.pnn.laterals.{k - 1}.head", [c[-1] for c in columns[:-1]])
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_perceptron_s_columns_are_those_of_the_equations(kind: str, tmp_path: Path) -> None:
    experiment, recorder, answers = learn(tmp_path, kind, backbone=perceptron())
    for t, batch in enumerate(samples_of(experiment.stream)):
        expected = logits_of(recorder.after[-1], batch["pixel_values"], t, last=2)
        torch.testing.assert_close(answers[-1][t][:, 2 * t : 2 * t + 2], expected, rtol=1e-4, atol=1e-5)


def train(recorder: Recorder, mistake: str = "") -> dict[str, Tensor]:
    """SGD with momentum on all that experience k may train; what it ends with."""
    end: dict[str, Tensor] = {}
    for k, (start, batches) in enumerate(zip(recorder.before, recorder.batches, strict=True)):
        w = start
        names = [n for n in w if n.startswith(("backbone.layers", "head", f"extras.pnn.laterals.{k - 1}."))]
        momentum = {n: torch.zeros_like(w[n]) for n in names}
        for batch in batches:
            w = {n: v.clone().requires_grad_(n in names) for n, v in w.items()}
            logits = logits_of(w, batch["pixel_values"], k, last=k, mistake=mistake)
            loss = F.cross_entropy(logits, batch["labels"] - 2 * k)
            found = torch.autograd.grad(loss, [w[n] for n in names], allow_unused=True)
            for name, g in zip(names, found, strict=True):
                momentum[name] = 0.9 * momentum[name] + (0 if g is None else g)
                w[name] = (w[name] - 0.1 * momentum[name]).detach()
        end = {n: v.detach() for n, v in w.items()}
    return end


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_hand_written_loop(kind: str, tmp_path: Path) -> None:
    _, recorder, _ = learn(tmp_path, kind, backbone=perceptron())
    expected = train(recorder)
    assert expected.keys() == recorder.after[-1].keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            recorder.after[-1][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("mistake", ["no connections", "not in the classifier"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    _, recorder, _ = learn(tmp_path, "linear", backbone=perceptron())
    expected, name = train(recorder, mistake), "backbone.layers.1.0.weight"
    assert not torch.allclose(recorder.after[-1][name], expected[name], rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_a_transformer_s_go_from_block_outputs_to_block_inputs(tmp_path: Path) -> None:
    """Two columns, run by hand block by block."""
    stream = TinyStream(2, scenario="task_incremental")
    with torch.enable_grad():
        experiment, _, answers = learn(
            tmp_path, "adapter", stream=stream, backbone=tiny_vit(), optimizer=OPTIMIZERS["adamw"]
        )
    learner = experiment.learner.eval()
    own, batch = learner.extras["pnn"], samples_of(stream)[1]
    laterals, states = own.laterals[0], []
    for k, backbone in enumerate((own.columns[0], learner.backbone)):
        model = backbone.model
        h, seen = model.embeddings(backbone.pixels(batch["pixel_values"])), []
        for i, block in enumerate(backbone.blocks()[1:]):
            seen.append(h)
            x = h
            if k:
                one = laterals.blocks[i]
                x = h + (one.alpha[0] * (states[0][i] @ one.v.weight.T)).clamp_min(0) @ one.u.weight.T
            h = block(x)
            h = h[0] if isinstance(h, tuple) else h
        seen.append(model.layernorm(h)[:, 0])
        states.append(seen)
    one = laterals.head
    logits = learner.head.linear(states[1][-1])[:, 2:]
    logits = logits + (one.alpha[0] * (states[0][-1] @ one.v.weight.T)).clamp_min(0) @ one.u.weight.T
    torch.testing.assert_close(answers[-1][1][:, 2:], logits, rtol=1e-4, atol=1e-5)


# -- what is learned never changes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backbone", ["tiny", "mlp", "vit", "bert"])
def test_earlier_columns_and_their_outputs_stay(backbone: str, optimizer: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": OPTIMIZERS[optimizer], "dropout": 0.3}
    if backbone == "bert":
        stream = TinyTextStream(scenario="task_incremental")
        options |= {"make_one": make_text_experiment, "stream": stream}
    else:
        options["backbone"] = {"tiny": None, "mlp": perceptron(0.3), "vit": tiny_vit()}[backbone]
    experiment, recorder, answers = learn(tmp_path, "adapter", **options)
    for t in range(3):
        own = slice(2 * t, 2 * t + 2)
        for later in answers[t + 1 :]:
            torch.testing.assert_close(later[t][:, own], answers[t][t][:, own], rtol=1e-6, atol=1e-6)
    end = recorder.after[-1]
    for t, state in enumerate(recorder.after[:-1]):
        for name, value in state.items():
            if name.startswith("backbone."):
                assert torch.equal(end[name.replace("backbone.", f"extras.pnn.columns.{t}.")], value), name
            if name.startswith("extras."):
                assert torch.equal(end[name], value), name
            if name.startswith("head."):
                assert torch.equal(end[name][: len(value)], value), name
    initial = {n: v for n, v in make_learner(experiment.stream, {}).state_dict().items() if n.startswith("backbone")}
    for start in recorder.before[1:] if backbone == "tiny" else ():
        assert all(torch.equal(start[n], v) for n, v in initial.items())


def test_earlier_columns_run_without_dropout_and_untrained(tmp_path: Path) -> None:
    experiment, _, _ = learn(tmp_path, "adapter", backbone=perceptron(0.5))
    learner = experiment.learner.train()
    own = learner.extras["pnn"]
    assert learner.backbone.training and own.laterals.training
    assert not any(m.training for m in own.columns.modules())
    trained = {n for n, p in learner.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("extras.pnn.columns", "extras.pnn.laterals.0")) for n in trained)
    assert any(n.startswith("extras.pnn.laterals.1") for n in trained)


@pytest.mark.parametrize("backbone", ["mlp", "bert"])
@torch.no_grad()
def test_a_mixed_batch_equals_one_task_at_a_time(backbone: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backbone": perceptron()}
    if backbone == "bert":
        options = {"make_one": make_text_experiment, "stream": TinyTextStream(scenario="task_incremental")}
    with torch.enable_grad():
        experiment, _, answers = learn(tmp_path, "adapter", **options)
    columns = [e.test.columns for e in experiment.stream]
    batch = {n: torch.cat([c[n] for c in columns]) for n in columns[0]}
    order = torch.randperm(len(batch["labels"]), generator=torch.Generator().manual_seed(0))
    together = experiment.learner.eval()({n: v[order] for n, v in batch.items()})
    torch.testing.assert_close(together.logits[order.argsort()], torch.cat(answers[-1]), rtol=1e-4, atol=1e-5)
    assert together.features.shape == (len(order), 16)


# -- what it refuses, and what it costs ---------------------------------------------------------------------------------


def test_a_task_that_comes_back_is_refused() -> None:
    stream = TinyStream(scenario="domain_incremental")
    learner = make_learner(stream, {"pnn": make()})
    learner.build(stream[0].info)
    learner.build(stream[0].info)
    with pytest.raises(ClplatformError, match="task 0 comes back"):
        learner.build(stream[1].info)


def test_cost_is_columns_and_connections() -> None:
    stream, pnn = TinyStream(scenario="task_incremental"), make()
    learner = make_learner(stream, {"pnn": pnn}, backbone=perceptron())
    column = 12 * 9 + 9 + 9 * 16 + 16
    total = column  # the initial weights
    for k, e in enumerate(stream):
        learner.build(e.info)
        learner.build(e.info)
        if k:
            total += column + (k + k * 9 * 9 + 9 * 16) + (k + k * 16 * 16 + 16 * 2)
        assert pnn.cost() == {"extra_parameters": total}
