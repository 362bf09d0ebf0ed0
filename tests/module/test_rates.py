"""Parts of the model with a learning rate of their own."""

from __future__ import annotations

import torch
from torch import nn

from clplatform.module.rates import at_rate


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
