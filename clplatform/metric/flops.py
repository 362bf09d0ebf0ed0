"""Floating-point operations of the backbone, counted without slowing it down.

While a model runs only the rows that pass are counted, by the size of a sample; what a sample costs is measured by
PyTorch's own counter on one dummy sample, later. A multiply-add is two operations. Passes with gradients count
forward and backward (of what is trained), passes of a teacher or of an importance estimate count as what they are.
Heads, losses, optimizers and element-wise work are left out, as is usual; so are the tokens that prompts add, and a
vocabulary's output layer. An encoder-decoder is taken to write as much as it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch  # type: ignore[attr-defined]
from torch.utils.flop_counter import FlopCounterMode

# Lengths at which a text backbone is measured; its work is a·T + b·T² in the length T.
LENGTHS = (8, 16)


class FlopMeter:
    """Counts the rows that pass through a backbone and its copies (teachers).

    Attributes:
        total: operations so far, up to the last `flush`.
    """

    def __init__(self) -> None:
        self.total = 0.0
        # shape of a sample, gradients? → rows
        self.rows: dict[tuple[tuple[int, ...], bool], int] = {}
        # gradients? → what a sample of a shape costs: measured once between two flushes
        self._known: dict[bool, Callable[[tuple[int, ...]], float]] = {}

    def __deepcopy__(self, memo: Any) -> FlopMeter:
        return self  # a copied backbone is counted here too

    def watch(self, backbone: nn.Module) -> None:
        """Count what passes through this module from now on."""
        backbone.register_forward_hook(self._count)

    def add(self, rows: int, length: int) -> None:
        """Count texts that were written token by token, as if they were read at once."""
        key = (length,), False
        self.rows[key] = self.rows.get(key, 0) + rows

    def _count(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = sample_tensor(args[0])
        if not isinstance(x, Tensor):  # a symbolic trace
            return
        whole, gradients = x, output.requires_grad
        while functorch.is_functorch_wrapped_tensor(whole):  # per-sample gradients: x is one of many samples
            whole, gradients = functorch.get_unwrapped(whole), True
        rows = x.shape[0] * whole.numel() // x.numel()
        key = tuple(x.shape[1:]), gradients
        self.rows[key] = self.rows.get(key, 0) + rows

    def flush(self, backbone: nn.Module) -> float:
        """Measure what the counted rows cost, with the backbone as it is now; returns `total`."""
        self.total = self.now(backbone)
        self.rows, self._known = {}, {}
        return self.total

    def now(self, backbone: nn.Module) -> float:
        """The total with the rows since the last `flush`. Cheap after every step: it measures only what is new."""
        rows, total = self.rows, self.total
        for (shape, gradients), n in rows.items():
            if gradients not in self._known:
                self.rows = {}  # those of measuring are not counted
                self._known[gradients] = self._costs(backbone, shape, gradients)
            total += n * self._known[gradients](shape)
        self.rows = rows
        return total

    def drop(self) -> None:
        """Forget the rows since the last `flush` (evaluation is not training)."""
        self.rows = {}

    def _costs(
        self, backbone: nn.Module, shape: tuple[int, ...], gradients: bool
    ) -> Callable[[tuple[int, ...]], float]:
        if len(shape) > 1:  # images of one size
            cost = measure(backbone, shape, gradients)
            return lambda shape: cost
        (short, long), (x, y) = LENGTHS, [measure(backbone, (t,), gradients) for t in LENGTHS]
        b = (y / long - x / short) / (long - short)
        a = x / short - b * short
        return lambda shape: a * shape[0] + b * shape[0] ** 2


def sample_tensor(batch: dict[str, Tensor]) -> Tensor:
    """The column of a batch whose shape decides the work."""
    return batch["pixel_values"] if "pixel_values" in batch else batch["input_ids"]


def measure(backbone: nn.Module, shape: tuple[int, ...], gradients: bool) -> float:
    """Operations for one sample: forward, and with `gradients` backward too. Changes nothing, draws nothing."""
    device = next(backbone.parameters()).device
    if len(shape) > 1:
        batch = {"pixel_values": torch.zeros(1, *shape, device=device)}
    else:
        ids = torch.zeros(1, *shape, dtype=torch.int64, device=device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    modes = {m: m.training for m in backbone.modules()}
    backbone.eval()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    try:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients and bool(trained)):
            output = backbone(batch)
            if output.requires_grad:
                torch.autograd.grad(output.sum(), trained, allow_unused=True)
    finally:
        for module, mode in modes.items():
            module.training = mode
    # Gradients pass through a frozen backbone to what was put into it (prompts): one more product for each of its own.
    return float(counter.get_total_flops()) * (2 if gradients and not trained else 1)
