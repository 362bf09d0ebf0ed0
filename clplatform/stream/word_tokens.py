"""Words as sub-tokens; the label of a word stands at its first one (Devlin et al. 2019, § 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplatform.stream.tokenizer import require_offsets
from clplatform.types import Batch


def tokenize_words(tokenizer: Any, sentences: Sequence[Sequence[str]], max_length: int) -> tuple[Batch, Tensor]:
    """Sentences, their words with spaces between them, as tokens.

    Returns:
        `input_ids` and `attention_mask` [N, T], padded to the longest, and int64 [N, T]: the number of the word that begins
        at a token, −1: none does. Words after the `max_length`-th token, and those that the tokenizer passes over
        (control characters), begin nowhere.
    """
    if not sentences:
        empty = torch.zeros(0, 1, dtype=torch.int64)
        return {"input_ids": empty, "attention_mask": empty}, empty
    require_offsets(tokenizer)
    out = tokenizer(
        [" ".join(words) for words in sentences], truncation=True, max_length=max_length, padding=True,
        padding_side="right", return_offsets_mapping=True, return_token_type_ids=False, split_special_tokens=True,
    )  # fmt: skip
    columns = {name: torch.tensor(out[name]) for name in ("input_ids", "attention_mask")}
    begins = np.full(columns["input_ids"].shape, -1, np.int64)
    offsets = np.array(out["offset_mapping"], np.int64)
    for i, words in enumerate(sentences):
        sizes = np.array([len(word) for word in words])
        starts = np.concatenate([[0], (sizes + 1).cumsum()[:-1]])
        first, last = (
            offsets[i, :, 0],
            offsets[i, :, 1] - 1,
        )  # its last character: some tokens have a space before theirs
        word = np.searchsorted(starts, last, side="right") - 1
        within = (last >= first) & (word >= 0) & (last < starts[word] + sizes[word])
        found, at = np.unique(np.where(within, word, -1), return_index=True)
        begins[i, at[found >= 0]] = found[found >= 0]
    return columns, torch.from_numpy(begins)
