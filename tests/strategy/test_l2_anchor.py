"""The L2 anchor against a hand-written loop and a closed form; `docs/add_a_strategy.md` shows it as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Model, Recorder, close, run, train
from stepwise import Named, anchor_of
from strategies import from_page
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream

import clplatform
from clplatform.config import conf_dir
from clplatform.strategy.l2_anchor import L2Anchor
from clplatform.types import Batch

STRENGTH = 0.3
REPOSITORY = Path(clplatform.__file__).parent.parent


def make(strength: float = STRENGTH) -> L2Anchor:
    strategy = from_page("l2_anchor", strength=strength)
    assert isinstance(strategy, L2Anchor)
    return strategy


def learn(recorder: Recorder, half: float = 0.5) -> Model:
    """λ/2 Σ (θ − θ*)² around the weights after the previous experience, old rows of the head only."""
    model, anchor = Model(recorder.before[0]), {}

    def loss(model: Model, batch: Batch, logits: Tensor) -> Tensor:
        total = F.cross_entropy(logits, batch["labels"])
        for name, p in model.named_parameters():
            if name in anchor:
                total = total + half * STRENGTH * ((p[: len(anchor[name])] - anchor[name]) ** 2).sum()
        return total

    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        train(model, batches, loss)
        anchor: Named = anchor_of(model)
    return model


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_equals_a_hand_written_loop(scenario: str, tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, "l2_anchor", make(), stream=TinyStream(noise=1.5, scenario=scenario))
    close(learn(recorder), experiment.learner, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="not close"):
        close(learn(recorder, half=1.0), experiment.learner, rtol=1e-4, atol=1e-5)


def test_where_the_loss_pulls_with_a_constant_force_the_weights_come_to_rest_at_g_over_λ(tmp_path: Path) -> None:
    """argmin of gᵀθ + λ/2 ‖θ − θ*‖² is θ* − g/λ."""
    anchor = make(strength=2.0)
    experiment, _ = run(tmp_path, "l2_anchor", anchor, stream=TinyStream(1))
    learner: Any = experiment.learner
    start = anchor.anchor["backbone.layer.weight"]
    force = torch.linspace(-1, 1, start.numel()).view_as(start)
    weight = learner.backbone.layer.weight
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        ((force * weight).sum() + anchor.loss(learner, {}, None)["l2_anchor"]).backward()  # type: ignore[arg-type]
        optimizer.step()
    torch.testing.assert_close(weight.detach(), start - force / 2.0)


def test_a_scale_and_new_rows_of_a_head(tmp_path: Path) -> None:
    """Parameters without dimensions have no rows (the cosine head's scale); new rows are free."""
    from clplatform.head.cosine import CosineHead

    anchor, stream = make(strength=1.0), TinyStream(2)
    experiment, _ = run(tmp_path, "l2_anchor", anchor, stream=TinyStream(1))
    learner: Any = experiment.learner
    learner.head = CosineHead(feature_size=16, scale=5.0)
    learner.head.grow(stream[0].info)
    anchor.after_experience(learner, stream[0])
    learner.head.grow(stream[1].info)
    assert anchor.loss(learner, {}, None)["l2_anchor"].item() == 0  # type: ignore[arg-type]
    with torch.no_grad():
        learner.head.scale += 2
        learner.head.weight[1, 3] += 4
        learner.head.weight[2] += 100
    penalty = anchor.loss(learner, {}, None)["l2_anchor"]  # type: ignore[arg-type]
    assert penalty.item() == pytest.approx(2**2 / 2 + 4**2 / 2)
    scale, weight = torch.autograd.grad(penalty, [learner.head.scale, learner.head.weight])
    assert scale.item() == pytest.approx(2)
    assert weight.nonzero().tolist() == [[1, 3]]


@pytest.mark.skipif(not (REPOSITORY / "docs").is_dir(), reason="not in a checkout")
def test_the_guide_shows_it_as_it_is() -> None:
    guide = (REPOSITORY / "docs" / "add_a_strategy.md").read_text()
    python, page = (re.findall(rf"```{kind}\n(.*?)```", guide, re.DOTALL)[0] for kind in ("python", "yaml"))
    assert python == (REPOSITORY / "clplatform" / "strategy" / "l2_anchor.py").read_text()
    assert page == (conf_dir() / "strategy" / "l2_anchor.yaml").read_text()
