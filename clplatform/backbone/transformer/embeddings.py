"""Tokens as vectors, with their positions.

B  batch    T  tokens    D  model size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplatform.backbone.transformer.positions import Learned, Positions, Rotary, Rotation, Sinusoidal
from clplatform.types import ClplatformError


class Embeddings(nn.Module):
    """scale · token + position (+ segment), then layer normalisation if asked for, and dropout.

    Args:
        n_tokens: of the vocabulary.
        size: D.
        head_size: of the attention, for rotary positions, which are not added but turn queries and keys.
        positions: their kind.
        max_length: positions that are learned; the other kinds have no end.
        n_segments: kinds of tokens that are told apart (BERT: first and second text); 0: none.
        scale: of the token's vector; √D in Vaswani et al. 2017, § 3.4.
        norm: the layer normalisation's ε (BERT, BART); None: no normalisation.
        dropout: of the sum.
    """

    def __init__(
        self,
        *,
        n_tokens: int,
        size: int,
        head_size: int,
        positions: Positions,
        max_length: int,
        n_segments: int = 0,
        scale: float = 1.0,
        norm: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale, self.max_length = scale, max_length if positions == "learned" else None
        self.token = nn.Embedding(n_tokens, size)
        self.position: nn.Module | None = None
        if positions == "learned":
            self.position = Learned(max_length, size)
        elif positions == "sinusoidal":
            self.position = Sinusoidal(size)
        self.rotary = Rotary(head_size) if positions == "rotary" else None
        self.segment = nn.Embedding(n_segments, size) if n_segments else None
        self.norm = nn.Identity() if norm is None else nn.LayerNorm(size, eps=norm)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, ids_BT: Tensor, *, start: int = 0, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Rotation | None]:
        """Token ids [B, T] → [B, T, D], and what attention turns queries and keys by, if positions are rotary.

        Args:
            start: position of the first token.
            positions_BT: positions of all tokens, instead.
            segments_BT: kinds of tokens; None: 0.

        Raises:
            ClplatformError: there are more tokens than learned positions.
        """
        x_BTD = self.token(ids_BT) * self.scale
        if positions_BT is None:
            end = start + ids_BT.shape[1]
            self.check_length(end)
            positions_BT = torch.arange(start, end, device=ids_BT.device)[None]
        if self.position is not None:
            x_BTD = x_BTD + self.position(positions_BT).to(x_BTD.dtype)
        if self.segment is not None:
            x_BTD = x_BTD + self.segment(torch.zeros_like(ids_BT) if segments_BT is None else segments_BT)
        rotation = None if self.rotary is None else self.rotary(positions_BT)
        return self.dropout(self.norm(x_BTD)), rotation

    def check_length(self, n_tokens: int) -> None:
        """Raises ClplatformError where so many tokens are more than there are positions."""
        if self.max_length is not None and n_tokens > self.max_length:
            raise ClplatformError(f"{n_tokens} tokens: the model has positions for {self.max_length}; give it fewer")
