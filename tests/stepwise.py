"""A training loop written out step by step, for strategies that watch the optimizer's path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from naive import Model
from torch import Tensor
from torch.nn import functional as F

from clplatform.types import Batch

Named = dict[str, Tensor]


def nothing(*_: Any) -> None: ...


def walk(
    model: Model, batches: list[Batch], penalty: Callable[[Model], Tensor], *,
    before: Callable[[Model, Batch], None] = nothing, after: Callable[[Named, Named], None] = nothing,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None, clip: float | None = None, accumulate: int = 1,
    penalised: bool = False,
) -> None:  # fmt: skip
    """Train on the cross-entropy plus a penalty. `accumulate` batches make a step, fewer at the end of an epoch of
    four; what they sum to is divided by `accumulate`, as Lightning does.

    Args:
        before: told the model and the first batch of a step.
        after: told the gradient of the task's loss alone (`penalised`: a usual mistake, with the penalty's) and the
            step that was taken.
    """
    named = dict(model.named_parameters())
    weights = [p for p in named.values() if p.ndim >= 2]
    others = [{"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0}]
    make = optimizer or (lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    optim = make([{"params": weights}, *others])
    epochs = [batches[i : i + 4] for i in range(0, len(batches), 4)]
    groups = [epoch[i : i + accumulate] for epoch in epochs for i in range(0, len(epoch), accumulate)]
    for group in groups:
        before(model, group[0])
        gradient = {name: torch.zeros_like(p) for name, p in named.items()}
        for batch in group:
            loss = F.cross_entropy(model(batch["pixel_values"]), batch["labels"]) / accumulate
            for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                gradient[name] += g
        pull = torch.autograd.grad(penalty(model), list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), pull, strict=True):
            p.grad = gradient[name] + (0 if g is None else g)
            if penalised:
                gradient[name] = p.grad.clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(named.values()), clip)
        start = {name: p.detach().clone() for name, p in named.items()}
        optim.step()
        after(gradient, {name: p.detach() - start[name] for name, p in named.items()})


def distance(model: Model, weight: Named, anchor: Named) -> Tensor:
    """Σ_i weight_i (θ_i − anchor_i)², over the rows that have an anchor."""
    total = torch.zeros((), requires_grad=True)
    for name, p in model.named_parameters():
        if name in anchor:
            total = total + (weight[name] * (p[: len(anchor[name])] - anchor[name]) ** 2).sum()
    return total


def anchor_of(model: Model) -> Named:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def learner_name(name: str) -> str:
    """A parameter of `Model` in the learner."""
    return {"layer": "backbone.layer", "head": "head.linear"}[name.partition(".")[0]] + "." + name.partition(".")[2]
