"""Runs that are killed inside an experience go on to the same bits, or say that they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche_cases import CASES
from avalanche_world import flat, hosted, hosting
from torch import Tensor
from world import same, weights

from clplatform.results import Results
from clplatform.types import ClplatformError

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


class Killed(Exception):
    pass


def killed(folder: Path, name: str, experience: int = 2, batch: int = 3) -> Any:
    """A run that breaks off at this batch of this experience, with a checkpoint after every batch."""
    run, count = hosting(folder, CASES[name], fitter={"checkpoint_every": 1}), 0

    def kill(trainer: Any, learner: Any, batch_idx: int) -> None:
        nonlocal count
        count += learner.experience.index == experience
        if count == batch:
            raise Killed

    run.fitter.after_batch = kill
    with pytest.raises(Killed):
        run.run()
    return run


def resumed(folder: Path, name: str) -> Any:
    run = hosting(folder, CASES[name])
    run.results = Results.load(folder)
    run.run(resume=True)
    return run


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, b[path]) if isinstance(x, Tensor) else x == b[path] for path, x in a.items()
    )


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.resume in ("inside", "repeats")])
def test_a_killed_run_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Weights, matrix, and all that the plugins hold in the end."""
    whole = hosting(tmp_path / "whole", CASES[name])
    whole.run()
    killed(tmp_path / "killed", name)
    assert (tmp_path / "killed" / "checkpoints" / "step.ckpt").exists() == (CASES[name].resume == "inside")
    again = resumed(tmp_path / "killed", name)
    assert same(weights(again.learner), weights(whole.learner))
    assert again.results.matrix == whole.results.matrix
    assert equal(flat(again.learner.chain.state_dict()), flat(whole.learner.chain.state_dict()))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.resume == "no" and case.same != "no"])
def test_what_cannot_go_on_says_so(name: str, tmp_path: Path) -> None:
    killed(tmp_path, name)
    with pytest.raises(ClplatformError, match=r"RARPlugin\.iter_replay\S* cannot be saved, so this run cannot go on"):
        resumed(tmp_path, name)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.resume == "repeats"])
def test_what_repeats_is_saved_where_its_loader_is_fresh(name: str, tmp_path: Path) -> None:
    """In the first experience nothing is replayed yet."""
    run = killed(tmp_path, name, experience=0)
    assert (tmp_path / "checkpoints" / "step.ckpt").exists()
    assert run.learner.chain.unsaved() == []


def test_what_repeats_is_named(tmp_path: Path) -> None:
    assert killed(tmp_path, "AGEMPlugin").learner.chain.unsaved() == ["avalanche: AGEMPlugin.buffer_dliter"]


def test_two_attributes_that_shared_an_object_may_part(tmp_path: Path) -> None:
    """RWalk's importance is one object with that of the last experience until a step is taken."""
    run = killed(tmp_path, "RWalkPlugin")
    plugin = hosted(run).made[0]
    assert plugin.iter_importance is not plugin.exp_importance
    before = {n: p.data.clone() for n, p in plugin.iter_importance.items()}
    state = run.learner.chain.state_dict()
    plugin.iter_importance = plugin.exp_importance
    run.learner.chain.load_state_dict(state)
    assert plugin.iter_importance is not plugin.exp_importance
    assert same({n: p.data for n, p in plugin.iter_importance.items()}, before)


def test_frozen_parts_and_eval_modes_come_back(tmp_path: Path) -> None:
    run = killed(tmp_path, "CWRStarPlugin")
    again = hosting(tmp_path / "again", CASES["CWRStarPlugin"])
    for experience in run.stream:
        again.learner.build(experience.info)
    again.learner.chain.load_state_dict(run.learner.chain.state_dict())
    for name, parameter in again.learner.named_parameters():
        assert parameter.requires_grad == name.startswith("head."), name
    assert not again.learner.backbone.dropout.training
    assert again.learner.head.linear.training
    saved = hosted(again).model.saved_weights
    assert saved.keys() == hosted(run).model.saved_weights.keys() == {0, 1, 2, 3}
    assert all((saved[c] == hosted(run).model.saved_weights[c]).all() for c in saved)
