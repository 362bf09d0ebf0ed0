"""What the optimizer's steps did to the task's loss, weight by weight: the path integral of SI and RWalk.

    change_i = −Σ_t g_i(t) (θ_i(t+1) − θ_i(t))        moved_i = Σ_t (θ_i(t+1) − θ_i(t))

g is the gradient of the loss without the strategy's own penalty, before clipping; the step is the one that was
really taken, whatever optimizer, clipping and weight decay made of the gradient (Zenke et al. 2017, Eq. 3). A penalty
that is recorded along with the loss must therefore not be part of it: its gradient is added after `before_step`.

Costs four numbers for each parameter, until they are cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Named = dict[str, Tensor]


class Path:
    """Sums over the steps since the last `clear`, by parameter name.

    Attributes:
        change: by how much each weight lowered the loss, to first order.
        moved: how far each weight went.
    """

    def __init__(self) -> None:
        self.change: Named = {}
        self.moved: Named = {}
        self._names: list[str] = []  # of the parameters that the step under way trains
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # gradient and weight before the step: allocated once

    def clear(self) -> None:
        self.change, self.moved = {}, {}
        self._names, self._kept = [], {}

    @torch.no_grad()
    def before_step(self, module: nn.Module) -> None:
        """Remember the gradients (`.grad`: unscaled, not clipped yet) and the weights."""
        trained = {name: p for name, p in module.named_parameters() if p.grad is not None}
        self._names = list(trained)
        for name, p in trained.items():
            if name not in self._kept:
                self._kept[name] = torch.empty_like(p), torch.empty_like(p)
        if trained:
            gradients, weights = self._before()
            torch._foreach_copy_(gradients, [p.grad for p in trained.values() if p.grad is not None])
            torch._foreach_copy_(weights, list[Tensor](trained.values()))

    @torch.no_grad()
    def after_step(self, module: nn.Module) -> None:
        """Add the step. One that was skipped (not finite) is forgotten by the next `before_step`."""
        if not self._names:
            return
        named = dict(module.named_parameters())
        gradients, back = self._before()
        torch._foreach_sub_(back, [named[name] for name in self._names])  # the step, backwards
        torch._foreach_addcmul_(self._sums(self.change, back), gradients, back)
        torch._foreach_sub_(self._sums(self.moved, back), back)
        self._names = []

    def _before(self) -> tuple[list[Tensor], list[Tensor]]:
        kept = [self._kept[name] for name in self._names]
        return [gradient for gradient, _ in kept], [weight for _, weight in kept]

    def _sums(self, named: Named, like: Sequence[Tensor]) -> list[Tensor]:
        for name, tensor in zip(self._names, like, strict=True):
            # What a checkpoint gave back is on the CPU.
            named[name] = named[name].to(tensor.device) if name in named else torch.zeros_like(tensor)
        return [named[name] for name in self._names]

    def n_floats(self) -> int:
        held = [*self.change.values(), *self.moved.values(), *(t for pair in self._kept.values() for t in pair)]
        return sum(t.numel() for t in held)

    def state_dict(self) -> dict[str, Any]:
        return {"change": self.change, "moved": self.moved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.change, self.moved = dict(state["change"]), dict(state["moved"])
