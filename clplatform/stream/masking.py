"""Masked language modelling (Devlin et al. 2019, § 3.1): which tokens are hidden, and by what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clplatform.data import derive_seed
from clplatform.types import IGNORED, Batch

RATE, HIDDEN, RANDOM = 0.15, 0.8, 0.1  # of the tokens; of those: behind the mask, another token (the rest: itself)


@dataclass
class Masking:
    """Chooses 15 % of a text's tokens (at least one) to be predicted: 80 % of them become the mask token, 10 % a random
    token, 10 % stay. Special tokens are neither chosen nor put in.

    Args:
        special: bool [V], the special tokens.
        mask_token_id: what hides a token.
    """

    special: Tensor
    mask_token_id: int

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A training batch with a new mask: `input_ids` and `labels` from `original_ids` [B, T]. A batch without them
        (of texts that were not read from the stream) stays as it is."""
        if "original_ids" not in batch:
            return batch
        uniform = torch.rand(3, *batch["original_ids"].shape, generator=generator)
        return batch | self.masked(batch["original_ids"], batch["attention_mask"], uniform)

    def fixed(self, original: Tensor, attention: Tensor, index: Tensor) -> Batch:
        """The same for ever: the mask is a function of the sample's id (`index` [B]), whatever the batch."""
        return self.masked(original, attention, _uniform(index, original.shape[1]))

    def masked(self, original: Tensor, attention: Tensor, uniform: Tensor) -> Batch:
        """`input_ids` and `labels` [B, T], drawn with numbers `uniform` [3, B, T] in [0, 1)."""
        uniform = uniform.to(original.device)
        special = self.special.to(original.device)
        free = attention.bool() & ~special[original]
        # The smallest numbers win: exactly round(0.15 · n) of each text's n free tokens.
        order = uniform[0].where(free, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
        n = free.sum(1, keepdim=True)
        chosen = (order < (RATE * n).round().clamp(min=1)) & free
        words = (~special).nonzero()[:, 0]
        other = words[(uniform[1] * len(words)).long().clamp(max=len(words) - 1)]
        ids = original.where(~(chosen & (uniform[2] < HIDDEN)), self.mask_token_id)
        ids = torch.where(chosen & (uniform[2] >= HIDDEN) & (uniform[2] < HIDDEN + RANDOM), other, ids)
        return {"input_ids": ids, "labels": original.where(chosen, IGNORED)}


def _uniform(index: Tensor, length: int) -> Tensor:
    """Numbers float32 [3, B, length] in [0, 1), a function of the sample's id, the position and the draw alone: a
    counter put through SplitMix64 (Steele et al. 2014), twice."""
    counters = np.arange(3, dtype=np.uint64)[:, None, None] << np.uint64(56)
    counters = counters + np.arange(length, dtype=np.uint64)
    ids = index.numpy().astype(np.uint64)[None, :, None] + np.uint64(derive_seed("masked_lm"))
    values = _mix(_mix(ids) ^ counters)
    return torch.from_numpy((values >> np.uint64(40)).astype(np.float32) / 2**24)


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
