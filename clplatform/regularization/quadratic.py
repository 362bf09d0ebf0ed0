"""The quadratic penalty that EWC, SI, MAS, RWalk and L2 anchors share, in one pass over the parameters.

    penalty = ½ Σ_i A_i (θ_i − μ_i)² + c

Several anchors collapse into one without approximation, since a sum of quadratics in θ is a quadratic:

    A (θ−μ)² + F (θ−θ*)² = (A+F) (θ − (Aμ + Fθ*)/(A+F))² + AF/(A+F) (μ−θ*)²

so the cost does not grow with the number of tasks; the last term is the constant c, kept so that the value is
the sum that the papers write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Named = dict[str, Tensor]


class Quadratic:
    """Weights A and anchors μ by parameter name."""

    def __init__(self) -> None:
        self.weight: Named = {}
        self.anchor: Named = {}
        self.constant = 0.0

    def __len__(self) -> int:
        return len(self.weight)

    def add(self, weight: Named, anchor: Named, decay: float = 1.0) -> None:
        """Add ½ Σ weight (θ − anchor)², after multiplying what is there by `decay`.

        A parameter that has grown since (new rows of a head) is anchored in its old rows only.
        """
        constant = torch.zeros((), dtype=torch.float64)
        for name, f in weight.items():
            a = fit(self.weight.get(name, torch.zeros_like(f)), f) * decay
            mu = fit(self.anchor.get(name, torch.zeros_like(f)), f)
            total = a + f
            share = torch.where(total > 0, f / total.clamp_min(torch.finfo(f.dtype).tiny), torch.zeros_like(f))
            gap = anchor[name] - mu
            constant += 0.5 * (a * share * gap**2).sum(dtype=torch.float64).cpu()
            # Where nothing matters yet, the anchor itself: a weight of zero then stays harmless.
            self.anchor[name] = torch.where(total > 0, mu + share * gap, anchor[name])
            self.weight[name] = total
        self.constant = self.constant * decay + float(constant)

    def replace(self, weight: Named, anchor: Named) -> None:
        """Forget what is there and anchor at `anchor`."""
        self.weight, self.anchor, self.constant = dict(weight), dict(anchor), 0.0

    def penalty(self, module: nn.Module) -> Tensor:
        """The penalty at the module's parameters: a scalar whose gradient is A(θ−μ)."""
        parameters, weight, anchor = self._at(module)
        return _penalty(module, weight, anchor, parameters) + self.constant

    @torch.no_grad()
    def add_gradient(self, module: nn.Module, factor: float) -> None:
        """Add `factor` · A(θ−μ) to the parameters' `.grad`: for those who need the loss's own gradient first."""
        parameters, weight, anchor = self._at(module)
        if not parameters:
            return
        gradients = []
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        torch._foreach_addcmul_(gradients, weight, torch._foreach_sub(parameters, anchor), value=factor)

    def _at(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The module's trainable parameters that are held, with A and μ grown to fit."""
        named = dict(module.named_parameters())
        names = [name for name in self.weight if name in named and named[name].requires_grad]
        for name in names:  # what a checkpoint gave back is on the CPU
            self.weight[name] = self.weight[name].to(named[name].device)
            self.anchor[name] = self.anchor[name].to(named[name].device)
        parameters: list[Tensor] = [named[name] for name in names]
        weight = [fit(self.weight[name], p) for name, p in zip(names, parameters, strict=True)]
        anchor = [fit(self.anchor[name], p) for name, p in zip(names, parameters, strict=True)]
        return parameters, weight, anchor

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": sum(t.numel() for t in (*self.weight.values(), *self.anchor.values()))}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "anchor": self.anchor, "constant": self.constant}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.anchor, self.constant = dict(state["weight"]), dict(state["anchor"]), state["constant"]


def squared_distance(module: nn.Module, anchor: Named) -> Tensor:
    """½ Σ_i (θ_i − μ_i)², a scalar whose gradient is θ − μ: the penalty with A = 1, without holding A.

    Rows that a parameter has beyond its anchor are free. Anchors are moved to their parameter's device.
    """
    parameters = []
    for name, p in module.named_parameters():
        if name in anchor and p.requires_grad:
            anchor[name] = anchor[name].to(p.device)
            parameters.append((p if p.shape == anchor[name].shape else p[overlap(p, anchor[name])], anchor[name]))
    return _penalty(module, None, [a for _, a in parameters], [p for p, _ in parameters])


def _penalty(module: nn.Module, weight: list[Tensor] | None, anchor: list[Tensor], parameters: list[Tensor]) -> Tensor:
    if not parameters:  # a training stage of something else
        return next(module.parameters()).new_zeros(())
    return _Penalty.apply(weight, anchor, *parameters)


class _Penalty(torch.autograd.Function):
    """Value and gradient in one pass: autograd over pow, mul and sum would read everything three times."""

    @staticmethod
    def forward(ctx: Any, weight: list[Tensor] | None, anchor: list[Tensor], *parameters: Tensor) -> Tensor:
        gap = torch._foreach_sub(list(parameters), anchor)
        gradient = gap if weight is None else torch._foreach_mul(gap, weight)
        ctx.save_for_backward(*gradient)
        return (
            0.5 * torch.stack([torch.dot(g.flatten(), d.flatten()) for g, d in zip(gradient, gap, strict=True)]).sum()
        )

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return (None, None, *torch._foreach_mul(list(ctx.saved_tensors), outer[0]))


def overlap(a: Tensor, b: Tensor) -> tuple[slice, ...]:
    """Where two tensors of the same number of dimensions both have values: an index of either."""
    return tuple(slice(0, min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))


def fit(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor on `like`'s device, with zeros for the rows (and columns) that `like` has beyond it; cut where it
    has fewer."""
    if tensor.shape == like.shape:
        return tensor.to(like.device)
    grown = torch.zeros_like(like)
    common = overlap(tensor, like)
    grown[common] = tensor[common].to(grown)
    return grown
