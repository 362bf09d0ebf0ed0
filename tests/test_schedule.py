"""Learning rates step by step, against their formulas."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from world import TinyStream, make_experiment

from clplatform.config import check_arguments, conf_dir
from clplatform.schedule import schedule
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import ClplatformError


def rates(kind: Any, warmup: float, n_steps: int, lr: float = 2.0) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, found = schedule(optimizer, n_steps, kind=kind, warmup=warmup), []
    for _ in range(n_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


def by_hand(kind: str, warmup: float, n_steps: int, lr: float = 2.0) -> list[float]:
    rising = round(warmup * n_steps)
    found = []
    for step in range(n_steps):
        if step < rising:
            found.append(lr * step / rising)
            continue
        done = (step - rising) / max(1, n_steps - rising)
        found.append(lr * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind])
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_rates_are_those_of_the_formula(kind: str, warmup: float) -> None:
    for n_steps in (1, 7, 20):
        assert rates(kind, warmup, n_steps) == pytest.approx(by_hand(kind, warmup, n_steps), abs=1e-9)


def test_a_warm_up_of_a_quarter_rises_evenly_from_zero() -> None:
    assert rates("linear", 0.25, 8) == pytest.approx([0.0, 1.0, 2.0, 5 / 3, 4 / 3, 1.0, 2 / 3, 1 / 3])


def test_a_rate_that_never_changes_needs_no_scheduler() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert schedule(optimizer, 10, kind="constant", warmup=0.0) is None


def test_a_stage_without_steps_has_a_schedule_too() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for kind in ("constant", "linear", "cosine"):
        schedule(optimizer, 0, kind=kind, warmup=0.5)


@pytest.mark.parametrize("group_lr", [None, 0.01])
def test_every_group_keeps_its_own_rate(group_lr: float | None) -> None:
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]
    if group_lr is not None:
        groups[1]["lr"] = group_lr
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = schedule(optimizer, 10, kind="linear", warmup=0.0)
    assert scheduler is not None
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.05 if group_lr is None else 0.005])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_in_a_run_it_is_stepped_with_the_optimizer_and_starts_anew_each_experience(
    accumulate: int, tmp_path: Path
) -> None:
    used: list[float] = []

    class Watch(Finetuning):
        def after_step(self, learner: Any) -> None:
            used.append(learner.optimizers().param_groups[0]["lr"])

    experiment = make_experiment(
        tmp_path, {"watch": Watch()}, stream=TinyStream(2), trainer={"accumulate_grad_batches": accumulate},
        schedule=partial(schedule, kind="linear", warmup=0.25),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experiment.run()
    steps = 2 * -(-4 // accumulate)  # epochs × steps in an epoch of four batches
    assert used == pytest.approx(2 * by_hand("linear", 0.25, steps, lr=0.1))


@pytest.mark.parametrize("name", [path.stem for path in (conf_dir() / "scheduler").glob("*.yaml")])
def test_pages(name: str) -> None:
    node = yaml.safe_load((conf_dir() / "scheduler" / f"{name}.yaml").read_text())
    values = {key: value for key, value in node.items() if not key.startswith("_")}
    assert values["kind"] == name
    check_arguments("scheduler", schedule, values, {"optimizer", "n_steps"})
    for wrong in ({"warmup": 1.5}, {"warmup": -0.1}, {"kind": "step"}):
        with pytest.raises(ClplatformError, match=rf"scheduler\.{next(iter(wrong))}"):
            check_arguments("scheduler", schedule, {**values, **wrong}, {"optimizer", "n_steps"})
