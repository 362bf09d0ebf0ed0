"""The state of a batch of texts that is being written: what `generate` and `beam` work on.

B  batch    T  tokens so far    V  vocabulary    R  rows that are kept
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplatform.backbone.transformer.cache import Cache
from clplatform.types import ClplatformError


class Decoding:
    """Texts so far, and what the model has computed for them.

    Args:
        decoder: a `Decoder`.
        head: hidden states → logits.
        prompt_BT: what the texts begin with.
        mask_BT: 1 for tokens, 0 for padding, which is on the left; None: no padding.
        use_cache: keep keys and values, instead of computing all tokens again for each new one.
        inputs: further inputs of the decoder, [B, …] each.

    Raises:
        ClplatformError: a prompt is empty, or padded on the right.
    """

    def __init__(
        self,
        decoder: Any,
        head: Any,
        prompt_BT: Tensor,
        mask_BT: Tensor | None,
        *,
        use_cache: bool,
        inputs: dict[str, Tensor] | None = None,
    ) -> None:
        if prompt_BT.shape[1] == 0 or (mask_BT is not None and not mask_BT[:, -1].all()):
            raise ClplatformError("every prompt must end in a token: pad shorter prompts on the left")
        self.decoder, self.head = decoder, head
        self.ids_BT, self.mask_BT, self.inputs = prompt_BT, mask_BT, inputs or {}
        self.cache = Cache(len(decoder.layers)) if use_cache else None

    def check_room(self, n_new: int) -> None:
        """Raises ClplatformError where the model has no positions for so many more tokens."""
        longest = self.ids_BT.shape[1] if self.mask_BT is None else int(self.mask_BT.sum(1).max())
        self.decoder.embeddings.check_length(longest + n_new - 1)  # the last token is never read

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token, float32 [B, V]."""
        first = 0 if self.cache is None else self.cache.length
        positions_BT = None
        if self.mask_BT is not None:
            positions_BT = (self.mask_BT.long().cumsum(1) - 1).clamp_min(0)[:, first:]
        x_BTD = self.decoder(
            self.ids_BT[:, first:], mask_BS=self.mask_BT, positions_BT=positions_BT, cache=self.cache, **self.inputs
        )
        return self.head(x_BTD[:, -1]).float()

    def append(self, tokens_B: Tensor) -> None:
        """Add a token to every text."""
        self.ids_BT = torch.cat([self.ids_BT, tokens_B[:, None]], 1)
        if self.mask_BT is not None:
            self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(tokens_B), 1)], 1)

    def repeat(self, n: int) -> None:
        """n copies of every text, one after the other."""
        rows_R = torch.arange(len(self.ids_BT), device=self.ids_BT.device).repeat_interleave(n)
        self.ids_BT = self.ids_BT[rows_R]
        self.mask_BT = None if self.mask_BT is None else self.mask_BT[rows_R]
        self.inputs = {name: value[rows_R] for name, value in self.inputs.items()}
        if self.cache is not None:
            self.cache.select(rows_R)

    def reorder(self, rows_R: Tensor) -> None:
        """Keep these texts (int64), each in the place of one that began with the same prompt: masks and further inputs are
        the same for them."""
        self.ids_BT = self.ids_BT[rows_R]
        if self.cache is not None:
            self.cache.reorder(rows_R)
