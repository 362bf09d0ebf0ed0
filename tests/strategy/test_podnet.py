"""PODNet: the pooled statistics and the losses written out, a hand-written training loop, and what the teacher is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Recorder, run
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.strategy.base import Chain
from clplatform.strategy.podnet import PODNet, pooled
from clplatform.types import Batch, ClplatformError

SPATIAL, FLAT, MARGIN = 2.0, 0.7, 0.3


def make(**changes: Any) -> PODNet:
    strategy = from_page(
        "podnet", **{"spatial": SPATIAL, "flat": FLAT, "margin": MARGIN, "proxies": 3, "scale": 1.0, **changes}
    )
    assert isinstance(strategy, PODNet)
    return strategy


def statistics(state: Tensor, mask: Tensor | None) -> list[float]:
    """p of one sample [tokens, D], number by number."""
    tokens, size = state.shape
    kept = [t for t in range(tokens) if mask is None or mask[t]]
    values = [sum(float(state[t, d]) ** 2 for t in kept) for d in range(size)]
    values += [sum(float(state[t, d]) ** 2 for d in range(size)) if t in kept else 0.0 for t in range(tokens)]
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


def test_hidden_states_are_pooled_over_tokens_and_over_channels() -> None:
    torch.manual_seed(0)
    states, mask = torch.randn(3, 5, 4), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    for m in (None, mask):
        expected = torch.tensor([statistics(s, None if m is None else m[i]) for i, s in enumerate(states)])
        torch.testing.assert_close(pooled(states, m), expected)
    flat = states[:, 0]
    torch.testing.assert_close(pooled(flat, mask), flat**2 / (flat**2).norm(dim=1, keepdim=True))


# -- a hand-written loop ------------------------------------------------------------------------------------------------


def nca(w: dict[str, Tensor], features: Tensor, labels: Tensor, first: int, mistake: str) -> Tensor:
    eta, n = w["eta"].exp(), len(w["P"])
    similarity = []
    for c in range(first, n):
        cosines = torch.stack([F.cosine_similarity(features, p[None]) for p in w["P"][c].view(3, 16)], 1)
        similarity.append((cosines.softmax(1) * cosines).sum(1))
    y = torch.stack(similarity, 1)
    losses = []
    for row, label in zip(y, (labels - first).tolist(), strict=True):
        others = torch.cat([row[:label], row[label + 1 :]]) if mistake != "own class below" else row
        margin = 0 if mistake == "no margin" else MARGIN
        losses.append((-(eta * (row[label] - margin)) + (eta * others).exp().sum().log()).clamp_min(0))
    return torch.stack(losses).mean()


def pod(w: dict[str, Tensor], then: dict[str, Tensor], x: Tensor, factor: float) -> Tensor:
    """Both distances, of the one hidden state (before the tanh) and of the features."""
    z, z_then = (x @ v["W"].T + v["b"] for v in (w, then))
    spatial = (F.normalize(z**2, dim=1) - F.normalize(z_then**2, dim=1)).square().sum() / len(x)
    flat = 2 - 2 * F.cosine_similarity(z.tanh(), z_then.tanh()).mean()
    return factor * (SPATIAL * spatial + FLAT * flat)


KEYS = {
    "W": "backbone.layer.weight",
    "b": "backbone.layer.bias",
    "P": "extras.podnet.weight",
    "eta": "extras.podnet.log_scale",
}


def train(recorder: Recorder, scenario: str, mistake: str = "") -> dict[str, Tensor]:
    w: dict[str, Tensor] = {}
    for i, (start, batches) in enumerate(zip(recorder.before, recorder.batches, strict=True)):
        begins = {k: start[name] for k, name in KEYS.items()}
        then = dict(w)
        w = {**begins, **{k: w[k] for k in ("W", "b", "eta") if w}}
        if then:
            w["P"] = torch.cat([then["P"], begins["P"][len(then["P"]) :]])  # only the new rows are taken over
        factor = math.sqrt(len(w["P"]) / 2) if mistake != "no factor" else 1.0
        momentum = {k: torch.zeros_like(v) for k, v in w.items()}
        for batch in batches:
            x = batch["pixel_values"].flatten(1)
            w = {k: v.detach().requires_grad_() for k, v in w.items()}
            first = 2 * i if scenario == "task_incremental" else 0
            loss = nca(w, (x @ w["W"].T + w["b"]).tanh(), batch["labels"], first, mistake)
            if then and mistake != "no distillation":
                loss = loss + pod(w, then, x, factor)
            for (k, v), g in zip(w.items(), torch.autograd.grad(loss, list(w.values())), strict=True):
                momentum[k] = 0.9 * momentum[k] + g
                w[k] = v.detach() - 0.1 * momentum[k]
        w = {k: v.detach() for k, v in w.items()}
    return w


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    _, recorder = run(tmp_path, "podnet", make(), last=True, stream=TinyStream(scenario=scenario))
    for k, value in train(recorder, scenario).items():
        torch.testing.assert_close(recorder.after[-1][KEYS[k]], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mistake", ["no margin", "own class below", "no factor", "no distillation"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    _, recorder = run(tmp_path, "podnet", make(), last=True, stream=TinyStream())
    expected = train(recorder, "class_incremental", mistake)
    assert not torch.allclose(recorder.after[-1][KEYS["W"]], expected["W"], rtol=1e-2, atol=1e-3)


# -- proxies, teacher, states -------------------------------------------------------------------------------------------


def test_new_proxies_start_among_the_features_of_their_class(tmp_path: Path) -> None:
    stream = TinyStream()
    _, recorder = run(tmp_path, "podnet", make(), last=True, stream=stream)
    for e in list(stream)[1:]:
        start = recorder.before[e.index]
        batch = e.train.fetch(torch.arange(len(e.train)))
        features = (batch["pixel_values"].flatten(1) @ start[KEYS["W"]].T + start[KEYS["b"]]).tanh()
        for c in e.classes:  # each is the mean direction of the samples that are nearest to it
            own = F.normalize(features[batch["labels"] == c], dim=1)
            proxies = start[KEYS["P"]][c].view(3, 16)
            nearest = (own @ proxies.T).argmax(1)
            assert len(nearest.unique()) == 3
            for k in range(3):
                torch.testing.assert_close(proxies[k], F.normalize(own[nearest == k].mean(0), dim=0))
        old = recorder.after[e.index - 1][KEYS["P"]]
        assert torch.equal(start[KEYS["P"]][: len(old)], old)


def terms(experiment: Any, batch: Batch) -> dict[str, Tensor]:
    learner = experiment.learner
    return learner.chain.strategies["podnet"].loss(learner, batch, learner(batch))


def test_the_teacher_is_the_model_of_before_in_eval_mode(tmp_path: Path) -> None:
    podnet, stream = make(), TinyStream()
    experiment, recorder = run(tmp_path, "podnet", podnet, last=True, stream=stream, dropout=0.5)
    learner, then = experiment.learner.train(), recorder.after[1]
    assert podnet.teacher is not None
    assert not any(m.training for m in podnet.teacher.backbone.modules())
    batch = stream[2].train.fetch(torch.arange(32))
    x = batch["pixel_values"].flatten(1)
    with torch.no_grad():
        output = learner(batch)  # with dropout after the hidden state
        found = podnet.loss(learner, batch, output)
        w, before = ({k: state[KEYS[k]] for k in ("W", "b")} for state in (recorder.after[2], then))
        z = x @ before["W"].T + before["b"]
        flat = 2 - 2 * F.cosine_similarity(output.features, z.tanh()).mean()
        torch.testing.assert_close(found["flat"], FLAT * math.sqrt(3) * flat, rtol=1e-4, atol=1e-5)
        both = pod(w, before, x, math.sqrt(3))
        clean = 2 - 2 * F.cosine_similarity((x @ w["W"].T + w["b"]).tanh(), z.tanh()).mean()
        expected = both - FLAT * math.sqrt(3) * clean
        torch.testing.assert_close(found["spatial"], expected, rtol=1e-4, atol=1e-5)
    assert podnet.states == []


def test_padding_changes_nothing(tmp_path: Path) -> None:
    stream = TinyTextStream()
    experiment = make_text_experiment(tmp_path, {"podnet": make()}, stream=stream)
    experiment.run()
    experiment.learner.train()  # which has no dropout
    batch = stream[2].train.fetch(torch.arange(16))
    longer = {n: F.pad(v, (0, 4)) if n in ("input_ids", "attention_mask") else v for n, v in batch.items()}
    with torch.no_grad():
        found, padded = terms(experiment, batch), terms(experiment, longer)
    assert found["spatial"] > 0
    for name in ("spatial", "flat"):
        torch.testing.assert_close(padded[name], found[name], rtol=1e-3, atol=1e-6)


def test_replayed_rows_are_distilled_too(tmp_path: Path) -> None:
    podnet, rows = make(), []
    loss = podnet.loss

    def spy(learner: Any, batch: Batch, output: Any) -> dict[str, Tensor]:
        if podnet.states:
            rows.append((len(batch["labels"]), *[len(s) for s in podnet.states]))
        return loss(learner, batch, output)

    podnet.loss = spy  # type: ignore[method-assign]
    chain = {"replay": from_page("replay", batch_size=5), "podnet": podnet}
    make_experiment(tmp_path, chain, stream=TinyStream(2)).run()
    assert rows == [(13, 13)] * 8


def test_label_smoothing_and_other_classifiers_are_refused(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, {"podnet": make()}, label_smoothing=0.1)
    with pytest.raises(ClplatformError, match=r"label_smoothing=0.1 .* give label_smoothing=0$"):
        experiment.run()
    for other in ("lwf", "lora_experts", "seq_star", "ncm", "icarl"):
        with pytest.raises(ValueError, match="cannot be combined"):
            Chain({other: from_page(other), "podnet": make()})
