"""Parts of the model with a learning rate of their own, and when strategies that train adapters use theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import from_page
from torch import nn
from world import TinyStream, make_experiment, tiny_vit

from clplatform.module.rates import all_at_rate, at_rate


def test_parameters_get_their_own_rate_and_keep_the_rest_of_their_group() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": [a, b]}, {"params": [c], "weight_decay": 0.0}]
    found = at_rate(groups, [b, c], 0.5)
    named = {id(a): "a", id(b): "b", id(c): "c"}
    readable = [{**g, "params": [named[id(p)] for p in g["params"]]} for g in found]
    assert readable == [
        {"params": ["a"]},
        {"params": ["b"], "lr": 0.5},
        {"params": ["c"], "weight_decay": 0.0, "lr": 0.5},
    ]
    rates = {named[id(p)]: g["lr"] for g in torch.optim.SGD(found, lr=0.1).param_groups for p in g["params"]}
    assert rates == {"a": 0.1, "b": 0.5, "c": 0.5}


def test_no_rate_changes_nothing() -> None:
    p = nn.Parameter(torch.zeros(1))
    groups = [{"params": [p]}]
    assert at_rate(groups, [p], None) is groups
    assert at_rate(groups, [], 0.5) == groups
    assert all_at_rate(groups, None) is groups


@pytest.mark.parametrize(
    ("first", "lr", "expected"),
    [("full", 0.02, [0.1, 0.02, 0.02]), ("adapter", 0.02, [0.02] * 3), ("full", None, [0.1] * 3)],
)
@pytest.mark.parametrize("name", ["lora_experts", "adapters", "o_lora", "inf_lora"])
def test_a_whole_backbone_is_trained_at_the_optimizer_s(
    name: str, first: str, lr: float | None, expected: list[float], tmp_path: Path
) -> None:
    rates: list[float] = []

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(groups, lr=0.1)
        (rate,) = {g["lr"] for g in made.param_groups}
        rates.append(rate)
        return made

    strategy = from_page(name, first=first, lr=lr)
    make_experiment(tmp_path, {name: strategy}, stream=TinyStream(), backbone=tiny_vit(), optimizer=optimizer).run()
    assert rates == expected
