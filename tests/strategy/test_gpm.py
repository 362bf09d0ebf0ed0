"""GPM: layers do the same to the inputs of earlier experiences, and the bases are those of NumPy's SVD."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import Recorder, run
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from world import TinyBackbone, TinyStream

from clplatform.projection.subspace import grown_basis
from clplatform.strategy.gpm import GPM

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=1.0),
}


def make(**changes: Any) -> GPM:
    strategy = from_page("gpm", **changes)
    assert isinstance(strategy, GPM)
    return strategy


def inputs(stream: Any, index: int) -> torch.Tensor:
    train = stream[index].train
    return train.fetch(torch.arange(len(train)))["pixel_values"].flatten(1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_old_inputs_give_the_same_pre_activations(optimizer: str, tmp_path: Path) -> None:
    """Four samples of each experience in 12 dimensions, all of their energy: in the end every dimension is taken."""
    stream, gpm = TinyStream(3, per_class=2), make(threshold=1.0)
    _, recorder = run(tmp_path, "gpm", gpm, stream=stream, optimizer=OPTIMIZERS[optimizer])
    for t in range(2):
        x, then, now = inputs(stream, t), recorder.after[t], recorder.after[2]
        before, after = (x @ w["backbone.layer.weight"].T + w["backbone.layer.bias"] for w in (then, now))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    changed = recorder.after[2]["backbone.layer.weight"] - recorder.after[1]["backbone.layer.weight"]
    assert changed.abs().max() > 0.01
    assert gpm.bases["layer"].shape == (12, 12)


def svd_basis(old: np.ndarray, r: np.ndarray, share: float) -> np.ndarray:
    """Eq. 5–9 written out on R itself."""
    rest = r - old @ (old.T @ r)
    u, s, _ = np.linalg.svd(rest, full_matrices=False)
    total, held, k = (r**2).sum(), ((old.T @ r) ** 2).sum(), 0
    while held < share * total:
        held += s[k] ** 2
        k += 1
    return np.concatenate([old, u[:, :k]], axis=1)


def test_bases_are_those_of_an_svd(tmp_path: Path) -> None:
    stream, gpm = TinyStream(3), make(threshold=0.8, increase=0.05)
    run(tmp_path, "gpm", gpm, stream=stream)
    expected, sizes = np.zeros((12, 0)), []
    for t, share in enumerate((0.8, 0.85, 0.9)):
        expected = svd_basis(expected, inputs(stream, t).double().numpy().T, share)
        sizes.append(expected.shape[1])
    assert 0 < sizes[0] < sizes[1] < sizes[2] < 12
    found = gpm.bases["layer"].double().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    np.testing.assert_allclose(found.T @ found, np.eye(found.shape[1]), atol=1e-6)


def test_a_basis_never_outgrows_the_layer() -> None:
    basis, generator = None, torch.Generator().manual_seed(0)
    for _ in range(4):
        r = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        basis = grown_basis(basis, r @ r.T, 1.0)
    assert basis is not None
    assert basis.shape == (5, 5)
    torch.testing.assert_close(basis @ basis.T, torch.eye(5), atol=1e-6, rtol=0)


def test_norms_stand_still_after_the_first_experience_and_dropout_goes_on(tmp_path: Path) -> None:
    gpm, seen = make(), []
    forward = gpm.forward

    def spy(learner: Any, batch: Any, run: Any) -> Any:
        output = forward(learner, batch, run)
        if learner.training:
            backbone = learner.backbone
            seen.append((learner.experience.index, backbone.norm.training, backbone.dropout.training))
        return output

    gpm.forward = spy  # type: ignore[method-assign]
    _, recorder = run(tmp_path, "gpm", gpm, stream=TinyStream(2), backbone=TinyBackbone(0.2, norm=True))
    assert set(seen) == {(0, True, True), (1, False, True)}
    before, after = ({n: t for n, t in w.items() if ".norm." in n} for w in recorder.after)
    assert len(before) == 5 and all(torch.equal(t, after[n]) for n, t in before.items())


def test_layers_of_a_transformer_are_projected_and_the_rest_stands_still(tmp_path: Path) -> None:
    gpm, recorder = make(threshold=0.9), Recorder()
    experiment = make_text_experiment(
        tmp_path, {"recorder": recorder, "gpm": gpm}, stream=TinyTextStream(2), optimizer=OPTIMIZERS["adamw"]
    )
    first: dict[str, torch.Tensor] = {}
    after = gpm.after_experience

    def keep(learner: Any, experience: Any) -> None:
        after(learner, experience)
        first.update({name: basis.clone() for name, basis in gpm.bases.items()} if experience.index == 0 else {})

    gpm.after_experience = keep  # type: ignore[method-assign]
    experiment.run()
    assert len(first) >= 6  # query, key, value, and three dense layers
    for name, value in recorder.after[0].items():
        if not name.startswith("backbone.") or not value.is_floating_point():
            continue
        change = recorder.after[1][name] - value
        layer = name.removeprefix("backbone.").removesuffix(".weight")
        if layer in first:
            assert change.abs().max() > 1e-4, name
            assert (change @ first[layer]).abs().max() < 1e-5, name
        else:
            assert not change.any(), name
