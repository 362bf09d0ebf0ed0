"""Stopping and going on, between experiences and in the middle of an epoch, to the same bits: every strategy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import STRATEGIES, is_for_transformers, scenario_of
from world import TinyStream, make_experiment, same, tiny_vit, weights

from clplatform import checkpoint
from clplatform.experiment import Experiment
from clplatform.results import Results
from clplatform.schedule import schedule
from clplatform.strategy.base import Strategy
from clplatform.types import ClplatformError, Stage

FITTER = {"checkpoint_every": 3}
# A schedule, because Lightning loses the loader's position where the optimizer asks for the number of steps.
SCHEDULE = partial(schedule, kind="linear", warmup=0.2)


class Killed(Exception):
    pass


def run_until(run_dir: Path, strategies: dict[str, Strategy], batch: int | None, **options: object):
    """Run, and break off after so many batches of the whole run (None: never)."""
    experiment = make_experiment(run_dir, strategies, fitter=FITTER, dropout=0.2, schedule=SCHEDULE, **options)  # type: ignore[arg-type]
    count = 0

    def kill(*args: object) -> None:
        nonlocal count
        count += 1
        if count == batch:
            raise Killed

    experiment.fitter.after_batch = kill
    if batch is None:
        experiment.run()
    else:
        with pytest.raises(Killed):
            experiment.run()
    return experiment


def break_off_after_the_first_experience(run_dir: Path, strategies: dict[str, Strategy], **options: object) -> None:
    experiment = make_experiment(run_dir, strategies, fitter=FITTER, dropout=0.2, schedule=SCHEDULE, **options)  # type: ignore[arg-type]
    learn = experiment._learn

    def kill(experience: Any, *, resume: bool) -> None:
        if experience.index == 1:
            raise Killed
        learn(experience, resume=resume)

    experiment._learn = kill  # type: ignore[method-assign]
    with pytest.raises(Killed):
        experiment.run()


def resume(run_dir: Path, strategies: dict[str, Strategy], **options: object):
    experiment = make_experiment(run_dir, strategies, fitter=FITTER, dropout=0.2, schedule=SCHEDULE, **options)  # type: ignore[arg-type]
    if (run_dir / "results.json").exists():
        experiment.results = Results.load(run_dir)
    experiment.run(resume=True)
    return experiment


def world(name: str) -> dict[str, Any]:
    strategies = STRATEGIES[name]()
    backbone = tiny_vit() if is_for_transformers(*strategies) else None
    return {"stream": TinyStream(scenario=scenario_of(*strategies)), "backbone": backbone}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Experiment]:
    """The run of a strategy that nothing breaks off, made once for all places where others are."""
    return cache(lambda name: run_until(tmp_path_factory.mktemp(name), STRATEGIES[name](), None, **world(name)))


# 8 batches in each experience (joint and cumulative: 8, 16, 24; gdumb: 9); checkpoints every 3, never at an epoch's last.
@pytest.mark.parametrize("batch", [2, 10, 15], ids=["before any checkpoint", "between experiences", "in an epoch"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_run_goes_on_to_the_same_bits(
    name: str, batch: int | None, undisturbed: Callable[[str], Experiment], tmp_path: Path
) -> None:
    make: Callable[[], dict[str, Strategy]] = STRATEGIES[name]
    whole = undisturbed(name)
    if whole.results.cost["steps"] == 0:  # nothing is trained by gradients: there is no batch to break off after
        batch = None
        break_off_after_the_first_experience(tmp_path, make(), **world(name))
    else:
        run_until(tmp_path, make(), batch, **world(name))
    assert batch != 15 or (tmp_path / "checkpoints" / "step.ckpt").exists()
    resumed = resume(tmp_path, make(), **world(name))
    assert resumed.results.matrix == whole.results.matrix
    assert resumed.results.validation_matrix == whole.results.validation_matrix
    assert same(weights(resumed.learner), weights(whole.learner))
    assert resumed.results.cost["steps"] == whole.results.cost["steps"]
    assert resumed.results.cost["samples"] == whole.results.cost["samples"]


def test_resume_really_starts_from_the_step_checkpoint(tmp_path: Path) -> None:
    run_until(tmp_path, STRATEGIES["finetuning"](), 15)
    experiment = make_experiment(tmp_path, STRATEGIES["finetuning"](), fitter=FITTER, dropout=0.2, schedule=SCHEDULE)
    experiment.results = Results.load(tmp_path)
    count = 0

    def counting(*args: object) -> None:
        nonlocal count
        count += 1

    experiment.fitter.after_batch = counting
    experiment.run(resume=True)
    assert count == 24 - 14  # the last checkpoint was after batch 14: of 12 and 14, the first is an epoch's last


def test_stages_resume_where_they_were(tmp_path: Path) -> None:
    class TwoStages(Strategy):
        def stages(self, learner, experience):
            return [Stage("one", max_epochs=1), Stage("two", max_epochs=2)]

    for batch in (3, 5, 8, 17, 22):
        whole = run_until(tmp_path / f"whole{batch}", {"s": TwoStages()}, None)
        run_until(tmp_path / f"killed{batch}", {"s": TwoStages()}, batch)
        resumed = resume(tmp_path / f"killed{batch}", {"s": TwoStages()})
        assert same(weights(resumed.learner), weights(whole.learner)), batch


def test_a_crash_while_consolidating_or_writing_costs_no_row(tmp_path: Path) -> None:
    whole = run_until(tmp_path / "whole", STRATEGIES["replay"](), None)
    experiment = make_experiment(
        tmp_path / "killed", STRATEGIES["replay"](), fitter=FITTER, dropout=0.2, schedule=SCHEDULE
    )
    save = experiment._save

    def crash(name: str, index: int, stage: int) -> None:
        if index == 2:
            raise Killed
        save(name, index, stage)

    experiment._save = crash  # type: ignore[method-assign]
    with pytest.raises(Killed):
        experiment.run()
    assert len(Results.load(tmp_path / "killed").matrix) == 3  # a row more than the checkpoint knows
    resumed = resume(tmp_path / "killed", STRATEGIES["replay"]())
    assert resumed.results.matrix == whole.results.matrix
    assert len(resumed.results.timing) == 3
    assert same(weights(resumed.learner), weights(whole.learner))


def test_early_stopping_survives(tmp_path: Path) -> None:
    options = {"trainer": {"max_epochs": 6}, "stream": TinyStream(2, noise=1.5)}
    fitter = {**FITTER, "patience": 2}
    whole = make_experiment(tmp_path / "a", STRATEGIES["finetuning"](), **{**options, "fitter": fitter})  # type: ignore[arg-type]
    whole.run()
    killed = make_experiment(tmp_path / "b", STRATEGIES["finetuning"](), **{**options, "fitter": fitter})  # type: ignore[arg-type]
    count = 0

    def kill(*args: object) -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise Killed

    killed.fitter.after_batch = kill
    with pytest.raises(Killed):
        killed.run()
    resumed = make_experiment(tmp_path / "b", STRATEGIES["finetuning"](), **{**options, "fitter": fitter})  # type: ignore[arg-type]
    resumed.run(resume=True)
    assert same(weights(resumed.learner), weights(whole.learner))
    assert resumed.results.cost["steps"] == whole.results.cost["steps"]


def test_a_damaged_step_checkpoint_falls_back(tmp_path: Path) -> None:
    whole = run_until(tmp_path / "whole", STRATEGIES["ewc"](), None)
    run_until(tmp_path / "killed", STRATEGIES["ewc"](), 15)
    path = tmp_path / "killed" / "checkpoints" / "step.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    resumed = resume(tmp_path / "killed", STRATEGIES["ewc"]())
    assert same(weights(resumed.learner), weights(whole.learner))
    assert any("damaged" in note for note in resumed.results.notes)


def test_checkpoints_are_checked_and_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    checkpoint.save(path, {"a": torch.arange(3), "b": [1, "two", None], "c": {"d": 1.5}})
    assert checkpoint.load(path)["c"] == {"d": 1.5}
    with pytest.raises(ClplatformError, match="no checkpoint"):
        checkpoint.load(tmp_path / "y.ckpt")
    (tmp_path / "z.ckpt").write_bytes(b"something else")
    with pytest.raises(ClplatformError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "z.ckpt")

    class Evil:
        def __reduce__(self):
            return (print, ("unpickled",))

    checkpoint.save(path, {"evil": Evil()})
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        checkpoint.load(path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.ckpt"
    checkpoint.save(path, {"a": 1})

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"a": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
