"""Bottleneck adapters (Houlsby et al. 2019) on top of every block of a Transformer, several on one backbone.

    h ← h + U relu(D norm(h))

One after each block, with a layer norm of its own and without biases, as Bapna & Firat 2019 place it and Madotto et al. 2021
use it. The rows of one batch may go through different adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.types import ClplatformError


class Adapter(nn.Module):
    """One adapter of one block; it changes nothing yet (U = 0).

    Args:
        size: of the block's output.
        bottleneck: rows of D.
    """

    def __init__(self, size: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.down = nn.Linear(size, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, size] → [B, T, size]."""
        return hidden + self.up(F.relu(self.down(self.norm(hidden))))


class Adapters(nn.ModuleList):
    """The adapters of one block, and which of them act: none, one, or one for each row of a batch.

    Attributes:
        choice: None; an adapter's number; or the numbers that occur in a batch and, for each row, its place among them
            (int64 [B]).
    """

    choice: int | tuple[list[int], Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, size] → [B, T, size]."""
        if self.choice is None:
            return hidden
        if isinstance(self.choice, int):
            return self[self.choice](hidden)
        numbers, place = self.choice
        chosen: list[Any] = [self[i] for i in numbers]
        gain, bias, down, up = (
            torch.stack(weights)[place]
            for weights in zip(*((a.norm.weight, a.norm.bias, a.down.weight, a.up.weight) for a in chosen), strict=True)
        )
        norm = F.layer_norm(hidden, hidden.shape[-1:], eps=chosen[0].norm.eps)
        inner = torch.addcmul(bias[:, None], norm, gain[:, None])
        return hidden + F.relu(inner @ down.mT) @ up.mT


def banks(backbone: Any) -> list[Any]:
    """The `Adapters` of every block."""
    return [m for m in backbone.modules() if isinstance(m, Adapters)]


def add_adapter(backbone: Any, number: int, *, bottleneck: int) -> None:
    """Add an adapter to every block; idempotent. What was trainable stays so.

    Args:
        number: 0, 1, … in this order.
    """
    device = next(backbone.parameters()).device
    for block in backbone.blocks()[1:]:  # the first part is the embeddings
        if not hasattr(block, "adapters"):
            block.adapters = Adapters()
            block.register_forward_hook(_adapt)
        if number == len(block.adapters):
            block.adapters.append(Adapter(backbone.feature_size, bottleneck).to(device))


def _adapt(block: Any, inputs: Any, output: Any) -> Any:
    """The block's output after its adapter. Some architectures give a tuple, of which it is the first."""
    hidden = output[0] if isinstance(output, tuple) else output
    size = block.adapters[0].norm.normalized_shape[0]
    if hidden.shape[-1] != size:
        raise ClplatformError(
            f"{type(block).__name__} gives {hidden.shape[-1]} features and the backbone {size}: adapters need a backbone "
            "all of whose blocks have features of one size, such as a ViT or BERT"
        )
    hidden = block.adapters(hidden)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def activate(backbone: Any, number: int | None) -> None:
    """Let this adapter act, from now on; None: only the backbone itself. Trains or freezes nothing."""
    for bank in banks(backbone):
        bank.choice = number


@contextmanager
def per_sample(backbone: Any, adapter_of_row: Tensor) -> Iterator[None]:
    """Inside, row b of a batch goes through the adapter `adapter_of_row[b]`, all in one pass.

    Args:
        adapter_of_row: int64 [B].
    """
    numbers, place = adapter_of_row.unique(return_inverse=True)
    found = numbers.tolist()
    for bank in banks(backbone):
        bank.choice = found[0] if len(found) == 1 else (found, place)
    try:
        yield
    finally:
        activate(backbone, None)


def adapter_parameters(backbone: Any, number: int) -> list[nn.Parameter]:
    """Of this adapter in every block."""
    return [p for bank in banks(backbone) for p in bank[number].parameters()]


def n_parameters(backbone: Any) -> int:
    """Parameters of all adapters."""
    return sum(p.numel() for bank in banks(backbone) for p in bank.parameters())
