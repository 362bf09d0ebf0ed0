"""Questions with their contexts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clplatform.stream.tokenizer import require_offsets
from clplatform.types import Batch, ClplatformError


@dataclass(frozen=True)
class Windows:
    """Questions with their contexts as tokens, N windows.

    Args:
        columns: `input_ids`, `attention_mask`, `answerable` (1 for the context's tokens, and for the first token, which stands
            for no answer) and, if the tokenizer tells the two apart, `token_type_ids`, int64 [N, T].
        offsets: where each token of the context begins and ends in `<question>\\n<context>`, int64 [N, T, 2] (other tokens: 0).
        pair: int64 [N], of which pair it is a window; ascending.
        n_cut: how many pairs were cut.
    """

    columns: Batch
    offsets: Tensor
    pair: Tensor
    n_cut: int


def tokenize_questions(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int, stride: int | None = None
) -> Windows:
    """Pairs of question and context as tokens. Too long a context is cut, or read in several windows; a question that would
    take more than half of the places is cut.

    Args:
        stride: tokens of the context that a window shares with the one before it; None: one window, the rest is cut off.

    Raises:
        ClplatformError: `stride` leaves no place for anything new.
    """
    if not pairs:
        empty = torch.zeros(0, 1, dtype=torch.int64)
        columns = {"input_ids": empty, "attention_mask": empty, "answerable": empty}
        return Windows(columns, torch.zeros(0, 1, 2).long(), empty[:, 0], 0)
    require_offsets(tokenizer)
    room = max_length - max_length // 2 - tokenizer.num_special_tokens_to_add(pair=True)
    if stride is not None and stride >= room:
        raise ClplatformError(
            f"stream.stride={stride}: a window of stream.max_length={max_length} tokens has {room} for its part of a context "
            f"beside a long question; give less than {room}"
        )
    questions, long = _shortened(tokenizer, [question for question, _ in pairs], max_length // 2)
    out = tokenizer(
        questions, [context for _, context in pairs], truncation="only_second", max_length=max_length, padding=True,
        padding_side="right", return_offsets_mapping=True, return_token_type_ids=True, split_special_tokens=True,
        return_overflowing_tokens=stride is not None, stride=stride or 0,
    )  # fmt: skip
    columns = {name: torch.tensor(out[name]) for name in ("input_ids", "attention_mask")}
    pair = torch.arange(len(pairs)) if stride is None else torch.tensor(out["overflow_to_sample_mapping"])
    context = torch.tensor([[s == 1 for s in encoding.sequence_ids] for encoding in out.encodings])
    columns["answerable"] = context.long()
    columns["answerable"][:, 0] = 1
    segments = torch.tensor(out["token_type_ids"])
    if segments.any():  # BERT's tokenizer tells the two apart, RoBERTa's does not
        columns["token_type_ids"] = segments
    shift = torch.tensor([len(question) + 1 for question, _ in pairs])[pair]
    offsets = (torch.tensor(out["offset_mapping"]) + shift[:, None, None]) * context[:, :, None]
    ends = torch.zeros(len(pairs), dtype=torch.int64).scatter_reduce(0, pair, offsets[:, :, 1].amax(1), "amax")
    whole = torch.tensor([len(q) + 1 + len(c.rstrip()) for q, c in pairs])
    return Windows(columns, offsets, pair, int(((ends < whole) | long).sum()))


def _shortened(tokenizer: Any, questions: list[str], n: int) -> tuple[list[str], Tensor]:
    """Questions of at most n tokens, and which were longer, bool [N]."""
    offsets = tokenizer(
        questions, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )["offset_mapping"]
    long = [len(own) > n for own in offsets]
    cut = [q[: own[n - 1][1]] if is_long else q for q, own, is_long in zip(questions, offsets, long, strict=True)]
    return cut, torch.tensor(long)
