"""OGD: the gradient is orthogonal to what is stored, against gradients taken one by one and NumPy's least squares."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import Model, Recorder, close, run
from projected import learn
from strategies import from_page
from torch import Tensor
from world import TinyStream, weights

from clplatform.strategy.ogd import OGD, orthonormal


def make(**changes: Any) -> OGD:
    strategy = from_page("ogd", **{"samples": 100, "capacity": 1000, **changes})
    assert isinstance(strategy, OGD)
    return strategy


def one_by_one(model: Model, stream: Any, index: int) -> list[list[Tensor]]:
    """The gradient of the true class's logit, for every training sample, parameter by parameter."""
    train = stream[index].train
    batch = train.fetch(torch.arange(len(train)))
    return [
        list(torch.autograd.grad(model(x[None])[0, y], list(model.parameters())))
        for x, y in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]


def padded(parts: list[Tensor], model: Model) -> np.ndarray:
    """A stored gradient [P] with zeros for the head's rows that came later."""
    whole = [torch.zeros_like(p) for p in model.parameters()]
    for w, part in zip(whole, parts, strict=True):
        w[: len(part)] = part
    return torch.cat([w.flatten() for w in whole]).double().numpy()


class ByHand:
    """g less its best approximation by the stored gradients (least squares), none of them orthonormalised."""

    def __init__(self, recorder: Recorder, stream: Any, experiences: int) -> None:
        self.recorder, self.stream = recorder, stream
        self.stored = {t: one_by_one(Model(recorder.after[t]), stream, t) for t in range(experiences)}

    def project(self, model: Model, g: Tensor) -> Tensor:
        done = model.head.out_features // 2 - 1
        rows = [padded(parts, model) for t in range(done) for parts in self.stored[t]]
        if not rows:
            return g
        G = np.stack(rows).T
        best = np.linalg.lstsq(G, g.double().numpy(), rcond=1e-6)[0]
        return torch.from_numpy(g.double().numpy() - G @ best).to(g)


def test_equals_a_hand_written_loop(tmp_path: Path) -> None:
    stream, ogd = TinyStream(3, per_class=4), make()
    experiment, recorder = run(tmp_path, "ogd", ogd, stream=stream, trainer={"max_epochs": 4})
    # one batch an epoch, so four batches in each experience
    close(learn(recorder, ByHand(recorder, stream, 2).project), experiment.learner, rtol=1e-3, atol=1e-4)


class Watch(OGD):
    """Writes down gradients as the optimizer gets them."""

    def edit_gradients(self, learner: Any) -> None:
        super().edit_gradients(learner)
        self.seen = [p.grad.clone() for p in learner.parameters()]


def test_steps_are_orthogonal_to_every_stored_gradient(tmp_path: Path) -> None:
    """Momentum too: the way from the first experience's weights to the second's has no part in them."""
    stream, ogd = TinyStream(2, per_class=8), Watch(samples=100, capacity=1000)
    experiment, recorder = run(
        tmp_path, "ogd", ogd, stream=stream, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    )
    model = Model(recorder.before[1])
    stored = [padded(parts, model) for parts in one_by_one(Model(recorder.after[0]), stream, 0)]
    last = torch.cat([g.flatten() for g in ogd.seen]).double().numpy()
    before, after = recorder.before[1], weights(experiment.learner)
    way = torch.cat([(after[n] - before[n]).flatten() for n in model.named()]).double().numpy()
    names = list(model.named())
    assert names == ["backbone.layer.weight", "backbone.layer.bias", "head.linear.weight", "head.linear.bias"]
    for direction in (last, way):
        assert np.linalg.norm(direction) > 1e-3
        for v in stored:
            assert abs(v @ direction) < 1e-4 * np.linalg.norm(v) * np.linalg.norm(direction)


def test_the_number_stored_is_capped_and_the_basis_is_orthonormal(tmp_path: Path) -> None:
    ogd = make(samples=8, capacity=12)
    run(tmp_path, "ogd", ogd, stream=TinyStream(3))
    flat = torch.cat([S.flatten(1) for S in ogd.basis.values()], dim=1)
    assert len(flat) == ogd.n_stored == 12
    torch.testing.assert_close(flat @ flat.T, torch.eye(12), atol=1e-5, rtol=0)
    assert ogd.cost()["extra_parameters"] == 12 * flat.shape[1]


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 0, 0]])
def test_dependent_gradients_take_no_room(order: list[int]) -> None:
    vectors = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    basis = orthonormal(torch.zeros(0, 7), vectors[order])
    assert basis.shape == (2, 7)
    torch.testing.assert_close(vectors @ basis.T @ basis, vectors)
    assert orthonormal(basis, vectors).shape == (2, 7)


def test_a_parameter_without_a_gradient_takes_part_in_the_projection() -> None:
    """Another task's classifier has none in this step; the whole gradient, with its zeros there, is projected."""
    model: Any = torch.nn.ModuleDict({"seen": torch.nn.Linear(3, 2), "other": torch.nn.Linear(2, 2)})
    named, ogd = dict(model.named_parameters()), make()
    n = sum(p.numel() for p in named.values())
    rows = torch.linalg.qr(torch.randn(n, 3)).Q.T
    parts = rows.split([p.numel() for p in named.values()], dim=1)
    ogd.basis = {name: S.reshape(3, *p.shape) for (name, p), S in zip(named.items(), parts, strict=True)}
    for name, p in named.items():
        p.grad = torch.randn_like(p) if name.startswith("seen") else None
    before = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in named.values()])
    ogd.edit_gradients(model)
    after = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
    torch.testing.assert_close(after, before - rows.T @ (rows @ before))
    assert (rows @ after).abs().max() < 1e-5
