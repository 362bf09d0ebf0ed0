"""A training loop written out for strategies that project the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from naive import Model, Recorder
from torch import Tensor
from torch.nn import functional as F

from clplatform.types import Batch

# g [P] → g̃ [P], asked once for each optimizer step, with the model as it is then
Projection = Callable[[Model, Tensor], Tensor]


def loss_gradient(model: Model, rows: list[tuple[Tensor, int]]) -> Tensor:
    """Gradient [P] of the mean cross-entropy on samples."""
    x, labels = torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])
    loss = F.cross_entropy(model(x), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def learn(recorder: Recorder, projection: Projection, *, accumulate: int = 1, clip: float | None = None) -> Model:
    """SGD with momentum on the recorded batches, four to an epoch. The gradient of a step is projected as a whole: after
    accumulation, before clipping."""
    model = Model(recorder.before[0])
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        epochs = [batches[i : i + 4] for i in range(0, len(batches), 4)]
        for group in [epoch[i : i + accumulate] for epoch in epochs for i in range(0, len(epoch), accumulate)]:
            step(model, optimizer, group, projection, accumulate, clip)
    return model


def step(
    model: Model, optimizer: Any, group: list[Batch], projection: Projection, accumulate: int, clip: float | None
) -> None:
    optimizer.zero_grad()
    for batch in group:
        (F.cross_entropy(model(batch["pixel_values"]), batch["labels"]) / accumulate).backward()
    parameters = list(model.parameters())
    whole = projection(model, torch.cat([p.grad.flatten() for p in parameters]))
    for p, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).clone()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
