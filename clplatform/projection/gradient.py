"""Gradients of other losses beside the one that is trained on, and gradients that do not contradict them.

Gradients are lists with an entry for each parameter; None: the loss does not depend on it, which counts as zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clplatform.projection.cone import multipliers
from clplatform.types import Batch

if TYPE_CHECKING:
    from clplatform.learner import Learner

Gradient = Sequence[Tensor | None]


def trained_parameters(learner: Learner) -> list[nn.Parameter]:
    return [p for p in learner.parameters() if p.requires_grad]


def gradient_of(learner: Learner, rows: Batch, parameters: list[nn.Parameter]) -> Gradient:
    """Gradient of the task's loss on rows from a memory, as a step on them would have it.

    The model is in the mode in which it trains: dropout is drawn, batch-norm normalises by these rows and takes them
    into its running statistics; the rows are augmented. The precision is the run's, but for float16, in which small
    gradients vanish without a scaled loss: there it is float32. `.grad` is not touched.
    """
    batch = learner.augment({name: value.to(learner.device, non_blocking=True) for name, value in rows.items()})
    scaled = getattr(learner.trainer.precision_plugin, "scaler", None) is not None
    precision = contextlib.nullcontext() if scaled else learner.precision_context()
    with torch.enable_grad(), precision:
        loss = learner.task_loss(batch, learner(batch))
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@torch.no_grad()
def project_one(parameters: list[nn.Parameter], reference: Gradient) -> None:
    """Change `.grad` to its projection on the half-space of non-negative inner products with `reference`.

        g̃ = g − min(0, g·r / r·r) r

    Without a conflict it stays as it is, to the bit.
    """
    pairs = [(p, r) for p, r in zip(parameters, reference, strict=True) if r is not None]
    with_both = [(p.grad, r) for p, r in pairs if p.grad is not None]
    if not with_both:
        return
    inner = torch.stack([torch.dot(g.flatten(), r.flatten()) for g, r in with_both]).sum()
    square = torch.stack([r.square().sum() for _, r in pairs]).sum()
    step = (inner / square).nan_to_num().clamp_max(0)
    for g, r in with_both:
        g.sub_(step * r)
    without = [(p, r) for p, r in pairs if p.grad is None]
    if without and step < 0:  # asked last, as a device has to be waited for
        for p, r in without:
            p.grad = -step * r


@torch.no_grad()
def project(parameters: list[nn.Parameter], references: list[Gradient], margin: float) -> None:
    """Change `.grad` to its projection on the cone of non-negative inner products with all `references`.

        g̃ = g + Gᵀ v*,  v* = argmin_{v ≥ γ} ½ vᵀ G Gᵀ v + (G g)ᵀ v

    where a reference (a row of G) has a negative inner product with g; else it stays as it is. γ is the margin. A
    gradient that is not finite stays too: the optimizer will not step.
    """
    rows = [(p, _stacked(p, column)) for p, column in zip(parameters, zip(*references, strict=True), strict=True)]
    rows = [(p, G) for p, G in rows if G is not None]
    inner = [G @ p.grad.flatten().to(G) for p, G in rows if p.grad is not None]
    if not inner:
        return
    products = torch.stack([torch.stack(inner).sum(0), *torch.stack([G @ G.T for _, G in rows]).sum(0)])
    products = products.double().cpu()  # the only time that a device is waited for
    if not products.isfinite().all() or (products[0] >= 0).all():
        return
    v = torch.from_numpy(multipliers(products[1:].numpy(), products[0].numpy(), margin))
    for p, G in rows:
        change = (v.to(G) @ G).view_as(p).to(p.dtype)
        p.grad = change if p.grad is None else p.grad.add_(change)


def _stacked(parameter: nn.Parameter, column: tuple[Tensor | None, ...]) -> Tensor | None:
    """One parameter's part of several gradients, [K, n] in float32 at least; None: no loss depends on it."""
    if all(part is None for part in column):
        return None
    parts = [torch.zeros_like(parameter) if part is None else part for part in column]
    G = torch.stack([part.flatten() for part in parts])
    return G.to(torch.promote_types(G.dtype, torch.float32))
