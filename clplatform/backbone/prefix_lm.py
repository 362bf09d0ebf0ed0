"""Pairs of texts for a decoder: the target goes on with the source (a prefix language model whose prefix is read causally).

    source  start  target  padding    what is read when it is trained
    padding  source  start            what it goes on with when it writes

B  batch    S  tokens of the source    T  tokens of the target    L  both, S + T    D  size of the features
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplatform.types import Batch


def joined(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of pairs as texts with all padding on the right, where a causal mask hides it: token ids and mask (1 for tokens),
    [B, L], and the places in them of the target's tokens, [B, T]."""
    written = batch["decoder_input_ids"]
    own = batch.get("decoder_attention_mask")
    ids_BL = torch.cat([batch["input_ids"], written], 1)
    mask_BL = torch.cat([batch["attention_mask"], torch.ones_like(written) if own is None else own], 1).long()
    padding_BL = 1 - mask_BL
    behind_BL = mask_BL.sum(1, keepdim=True) + padding_BL.cumsum(1) - 1
    places_BL = torch.where(mask_BL == 1, mask_BL.cumsum(1) - 1, behind_BL)
    ids_BL, mask_BL = (torch.zeros_like(x).scatter(1, places_BL, x) for x in (ids_BL, mask_BL))
    return ids_BL, mask_BL, places_BL[:, batch["input_ids"].shape[1] :]


def of_targets(features_BLD: Tensor, places_BT: Tensor) -> Tensor:
    """Features of whole texts at the target's tokens, [B, T, D]."""
    return features_BLD.gather(1, places_BT[:, :, None].expand(-1, -1, features_BLD.shape[2]))


def prompts(batch: Batch, start: int) -> tuple[Tensor, Tensor]:
    """Sources padded on the left, and the token from which a target starts: ids and mask [B, S + 1]."""
    mask_BS = batch["attention_mask"]
    order_BS = mask_BS.argsort(dim=1, stable=True)  # padding first, tokens in their order
    ids_BS = batch["input_ids"].gather(1, order_BS)
    one_B1 = mask_BS.new_ones(len(mask_BS), 1)
    return torch.cat([ids_BS, start * one_B1], 1), torch.cat([mask_BS.gather(1, order_BS), one_B1], 1)
