"""Parts of parameters that stay as they are, to the bit, while the rest of them is trained.

A gradient of zero is not enough: momentum and weight decay move what gets none. So gradients are zeroed, and values are put
back after every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Held:
    """What is held at the moment; costs a copy of each parameter of which something is held."""

    def __init__(self) -> None:
        self.parts: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, where it is held, its value

    def hold(self, parameter: nn.Parameter, where: Tensor) -> None:
        """From now on the parameter keeps its present values at these places (bool, of its shape)."""
        if parameter.requires_grad and where.any():
            self.parts.append((parameter, where, parameter.detach().clone()))

    def hold_rows(self, module: nn.Module, rows: dict[str, int]) -> None:
        """Hold the first rows of a module's parameters, and those without dimensions.

        Args:
            rows: as `n_rows` counted them.
        """
        for name, p in module.named_parameters():
            where = torch.full_like(p, p.ndim == 0, dtype=torch.bool)
            if p.ndim:
                where[: rows.get(name, 0)] = True
            self.hold(p, where)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        for p, where, _ in self.parts:
            if p.grad is not None:
                p.grad.masked_fill_(where, 0)

    @torch.no_grad()
    def restore(self) -> None:
        for p, where, value in self.parts:
            p.copy_(torch.where(where, value.to(p), p))  # the precision may have changed since

    def release(self) -> None:
        self.parts = []


def n_rows(module: nn.Module) -> dict[str, int]:
    """Size of the first dimension of a module's parameters (of a head: its classes)."""
    return {name: len(p) for name, p in module.named_parameters() if p.ndim}
