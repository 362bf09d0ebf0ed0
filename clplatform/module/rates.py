"""Learning rates of parts of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def at_rate(groups: list[dict[str, Any]], parameters: Iterable[nn.Parameter], lr: float | None) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, in which these parameters have a learning rate of their own.

    Args:
        lr: None changes nothing.
    """
    if lr is None:
        return groups
    own = {id(p) for p in parameters}
    kept = [{**g, "params": [p for p in g["params"] if id(p) not in own]} for g in groups]
    apart = [{**g, "params": [p for p in g["params"] if id(p) in own], "lr": lr} for g in groups]
    return [g for g in (*kept, *apart) if g["params"]]


def all_at_rate(groups: list[dict[str, Any]], lr: float | None) -> list[dict[str, Any]]:
    """The optimizer's parameter groups at this learning rate; None changes nothing."""
    return groups if lr is None else [{**g, "lr": lr} for g in groups]
