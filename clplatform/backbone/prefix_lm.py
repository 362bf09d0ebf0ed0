"""Pairs of texts for a decoder: the target goes on with the source (a prefix language model whose prefix is read causally).

    source  padding  start  target  padding        what is read when it is trained: padding is hidden, and has no position
    padding  source  start                         what it goes on with when it writes

B  batch    S  tokens of the source    T  tokens of the target
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplatform.types import Batch


def joined(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of pairs → token ids, mask (1 for tokens) and positions, all [B, S + T]."""
    written = batch["decoder_input_ids"]
    mask = batch.get("decoder_attention_mask")
    mask_BT = torch.cat([batch["attention_mask"], torch.ones_like(written) if mask is None else mask], 1)
    return torch.cat([batch["input_ids"], written], 1), mask_BT, positions(mask_BT)


def prompts(batch: Batch, start: int) -> tuple[Tensor, Tensor]:
    """Sources padded on the left, and the token from which a target starts: ids and mask [B, S + 1]."""
    mask_BS = batch["attention_mask"]
    order_BS = mask_BS.argsort(dim=1, stable=True)  # padding first, tokens in their order
    ids_BS = batch["input_ids"].gather(1, order_BS)
    one_B1 = mask_BS.new_ones(len(mask_BS), 1)
    return torch.cat([ids_BS, start * one_B1], 1), torch.cat([mask_BS.gather(1, order_BS), one_B1], 1)


def positions(mask_BT: Tensor) -> Tensor:
    """Each token's number among those that are no padding, from 0."""
    return (mask_BT.long().cumsum(1) - 1).clamp_min(0)
