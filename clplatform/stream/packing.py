"""Documents as one row of tokens, and that row cut into blocks for a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplatform.stream.tokenizer import require_offsets
from clplatform.types import IGNORED, Batch

PIECE = 20_000  # characters that are tokenized at once: some tokenizers take quadratic time


@dataclass
class TokenRow:
    """Documents one after another, each ended by `eos`.

    Args:
        ids: int64 [L].
        n_bytes: int64 [L], the UTF-8 bytes of text that a token stands for: from the end of the token before it to its
            own. Of a character that is cut into several tokens all bytes are the first one's; what a tokenizer passes
            over (spaces) is the next token's, at the end of a document that of `eos`, which has none otherwise. So they
            sum to the bytes of the documents.
    """

    ids: Tensor
    n_bytes: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def token_row(tokenizer: Any, documents: Sequence[str], eos: int) -> TokenRow:
    """Tokenize documents without special tokens (which are text, where they are spelt out), and join them."""
    require_offsets(tokenizer)
    rows = [_document(tokenizer, text, eos) for text in documents]
    ids, n_bytes = (np.concatenate([r[i] for r in rows]) if rows else np.zeros(0, np.int64) for i in (0, 1))
    return TokenRow(torch.from_numpy(ids), torch.from_numpy(n_bytes))


def _document(tokenizer: Any, text: str, eos: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = list(_pieces(text))
    out = tokenizer(
        pieces, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False,
        split_special_tokens=True,
    ) if pieces else {"input_ids": [], "offset_mapping": []}  # fmt: skip
    starts = np.cumsum([0, *map(len, pieces)])
    ends = [np.array([end for _, end in o], np.int64) + s for o, s in zip(out["offset_mapping"], starts, strict=False)]
    # The end of the text that is covered so far, in characters, then in bytes.
    covered = np.concatenate([*ends, [len(text)]]).astype(np.int64)
    n_bytes = np.diff(_byte_positions(text)[covered], prepend=0)
    ids = np.concatenate([*(np.array(i, np.int64) for i in out["input_ids"]), [eos]]).astype(np.int64)
    return ids, n_bytes


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, if there are lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def _byte_positions(text: str) -> np.ndarray:
    """Where the characters 0 … n begin in UTF-8, int64 [n + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], sizes.cumsum()])


def causal_blocks(row: TokenRow, max_length: int, pad: int) -> Batch:
    """Blocks of at most `max_length` + 1 tokens that share one token with the next, so that every token but the first
    of the row is predicted once.

    Returns:
        `input_ids`, `attention_mask`, `labels` [N, max_length], which stand where they are predicted (`IGNORED` in the
        padding of the last block), and `n_bytes` [N]: the bytes that a block's labels stand for.
    """
    ids = _blocks(row.ids[:-1], max_length, pad)
    labels = _blocks(row.ids[1:], max_length, IGNORED)
    n_bytes = _blocks(row.n_bytes[1:], max_length, 0).sum(1)
    return {"input_ids": ids, "attention_mask": (labels != IGNORED).long(), "labels": labels, "n_bytes": n_bytes}


def framed_blocks(row: TokenRow, max_length: int, bos: int, eos: int, pad: int) -> Batch:
    """Blocks `bos` … `eos` of at most `max_length` tokens: `original_ids` and `attention_mask` [N, max_length].

    The last document's own `eos` is left to the frame.
    """
    inner = _blocks(row.ids[:-1], max_length - 2, -1)
    n = (inner >= 0).sum(1, keepdim=True)
    ids = torch.nn.functional.pad(inner, (1, 1), value=-1)
    ids[:, 0] = bos
    ids.scatter_(1, n + 1, eos)
    mask = ids >= 0
    return {"original_ids": ids.where(mask, pad), "attention_mask": mask.long()}


def _blocks(values: Tensor, size: int, fill: int) -> Tensor:
    """values [L] → [ceil(L / size), size], filled up."""
    n = -(-len(values) // size)
    return torch.nn.functional.pad(values, (0, n * size - len(values)), value=fill).view(n, size)
