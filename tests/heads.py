"""Heads that are made and grown by hand, for their tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clplatform.head.cosine import CosineHead
from clplatform.head.linear import LinearHead
from clplatform.types import ExperienceInfo

# Heads that have one row for each class, in the order of their numbers.
GROWING: dict[str, Callable[[int], Any]] = {
    "single": lambda size: LinearHead(feature_size=size),
    "cosine": lambda size: CosineHead(feature_size=size, scale=10.0),
}


def info(index: int, classes: tuple[int, ...], n_seen: int, *, task: int = 0) -> ExperienceInfo:
    return ExperienceInfo(index, f"e{index + 1}", task, classes, n_seen)


def grown(head: Any, n_classes: int) -> Any:
    """The head with so many classes from one experience."""
    torch.manual_seed(0)
    head.grow(info(0, tuple(range(n_classes)), n_classes))
    return head


def filled(head: Any, n_classes: int) -> Any:
    """The same with weights that no initialisation would draw."""
    for p in grown(head, n_classes).parameters():
        nn.init.normal_(p, std=3.0)
    return head
