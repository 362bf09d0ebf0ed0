"""Columns of one architecture side by side, each with connections from those before it (Rusu et al. 2016, Eq. 1 and 2).

    h_i^{(k)} = f( W_i^{(k)} h_{i−1}^{(k)} + a_i^{(k)}(h_{i−1}^{(1)}, …, h_{i−1}^{(k−1)}) )
    linear:  a = Σ_{j<k} U^{(k:j)} h^{(j)},      adapter:  a = U σ( V [α_1 h^{(1)}; …; α_{k−1} h^{(k−1)}] )

This is so for every layer of a perceptron, and for the classifier of any backbone. Between a Transformer's blocks, which are
more than W, a is added to the block's input: x_i^{(k)} = h_{i−1}^{(k)} + a_i^{(k)}, token by token. What is connected is
always a column's own output h, without what was added to it. The first block reads the input and has no connections.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplatform.module.hidden import first_input, linear_blocks, with_first_input
from clplatform.types import Batch, ClplatformError

Kind = Literal["linear", "adapter"]


class Lateral(nn.Module):
    """a_i: the same layer of all earlier columns, [..., n_in] each → [..., n_out]."""

    def __init__(self, kind: Kind, n_columns: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_in = n_in
        self.alpha: nn.Parameter | None = None
        self.v: nn.Linear | None = None
        if kind == "adapter":
            self.alpha = nn.Parameter(0.1 * torch.rand(n_columns))  # small, for scales that may differ
            self.v = nn.Linear(n_columns * n_in, n_in, bias=False)
        self.u = nn.Linear(n_in if kind == "adapter" else n_columns * n_in, n_out, bias=False)

    def forward(self, earlier: list[Tensor]) -> Tensor:
        if earlier[0].shape[-1] != self.n_in:
            raise ClplatformError(
                f"the backbone's blocks differ in width ({earlier[0].shape[-1]} and {self.n_in}), and lateral connections are "
                "for one width, except in a perceptron: choose another backbone"
            )
        if self.alpha is None or self.v is None:
            return self.u(torch.cat(earlier, -1))
        return self.u(self.v(torch.cat([a * h for a, h in zip(self.alpha, earlier, strict=True)], -1)).relu())


class Laterals(nn.Module):
    """All connections into one column.

    Args:
        kind: see above.
        n_columns: how many there are before it.
        n_classes: of its classifier.
    """

    def __init__(self, backbone: Any, *, kind: Kind, n_columns: int, n_classes: int) -> None:
        super().__init__()
        size, linears = backbone.feature_size, linear_blocks(backbone)
        widths = (
            [(m.in_features, m.out_features) for m in linears] if linears else [(size, size)] * len(backbone.blocks())
        )
        self.blocks = nn.ModuleList(Lateral(kind, n_columns, a, b) for a, b in widths[1:])
        self.head = Lateral(kind, n_columns, size, n_classes)


def run_column(backbone: Any, batch: Batch, laterals: Laterals | None, earlier: list[list[Tensor]]) -> list[Tensor]:
    """One column's forward pass.

    Args:
        earlier: what this function returned for the columns before.

    Returns:
        The inputs of its blocks but the first, [B, D] or [B, tokens, D], and its features [B, D].
    """
    blocks, linears = backbone.blocks()[1:], linear_blocks(backbone)
    states: list[Any] = [None] * len(blocks)
    with ExitStack() as stack:
        for i, block in enumerate(blocks):

            def before(module: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                states[i] = first_input(args, kwargs)
                if laterals is None or linears:
                    return None
                return with_first_input(args, kwargs, states[i] + laterals.blocks[i]([s[i] for s in earlier]))

            def after(module: nn.Module, args: Any, output: Tensor, i: int = i) -> Tensor:
                assert laterals is not None
                return output + laterals.blocks[i]([s[i] for s in earlier])

            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            if linears and laterals is not None:
                stack.callback(linears[i + 1].register_forward_hook(after).remove)
        features = backbone(batch)
    return [*states, features]
