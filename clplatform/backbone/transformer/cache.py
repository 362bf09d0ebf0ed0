"""Keys and values that decoding has computed already, so that a new token costs one token's work.

B  batch    N  heads    S  tokens attended to    H  size of a head    R  rows that are kept
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValues:
    """Keys and values of one attention module, [B, N, S, H] each; none at first."""

    def __init__(self) -> None:
        self.k_BNSH: Tensor | None = None
        self.v_BNSH: Tensor | None = None

    @property
    def length(self) -> int:
        """S."""
        return 0 if self.k_BNSH is None else self.k_BNSH.shape[2]

    def extend(self, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of T new tokens; returns all of them."""
        if self.k_BNSH is not None and self.v_BNSH is not None:
            k_BNTH, v_BNTH = torch.cat([self.k_BNSH, k_BNTH], 2), torch.cat([self.v_BNSH, v_BNTH], 2)
        self.k_BNSH, self.v_BNSH = k_BNTH, v_BNTH
        return k_BNTH, v_BNTH

    def select(self, rows_R: Tensor) -> None:
        """Keep these rows of the batch (int64), in this order; one may be kept several times."""
        if self.k_BNSH is not None and self.v_BNSH is not None:
            self.k_BNSH, self.v_BNSH = self.k_BNSH[rows_R], self.v_BNSH[rows_R]


class LayerCache:
    """Of one decoder layer: the tokens written so far, and the encoder's, which never change."""

    def __init__(self) -> None:
        self.own = KeyValues()
        self.cross = KeyValues()


class Cache:
    """Of a decoder with so many layers."""

    def __init__(self, n_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Tokens of the decoder that are in it."""
        return self.layers[0].own.length

    def select(self, rows_R: Tensor) -> None:
        """Keep these rows of the batch (int64 [R])."""
        for layer in self.layers:
            layer.own.select(rows_R)
            layer.cross.select(rows_R)

    def reorder(self, rows_R: Tensor) -> None:
        """The same where rows only change places with rows of the same source: the encoder's keys stay."""
        for layer in self.layers:
            layer.own.select(rows_R)
