"""Questions with their contexts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clplatform.types import Batch


def tokenize_questions(tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int) -> tuple[Batch, Tensor, int]:
    """Pairs of question and context as tokens; what is too long is cut off the context, and off a question that would take
    more than half of the places.

    Returns:
        `input_ids`, `attention_mask`, `answerable` (1 for the context's tokens, and for the first token, which stands for no
        answer) and, if the tokenizer tells the two apart, `token_type_ids`, [N, T]; where each token of the context begins
        and ends in `<question>\\n<context>`, int64 [N, T, 2] (other tokens: 0); how many pairs were cut.
    """
    if not pairs:
        empty = torch.zeros(0, 1, dtype=torch.int64)
        return {"input_ids": empty, "attention_mask": empty, "answerable": empty}, torch.zeros(0, 1, 2).long(), 0
    questions, long = _shortened(tokenizer, [question for question, _ in pairs], max_length // 2)
    out = tokenizer(
        questions, [context for _, context in pairs], truncation="only_second", max_length=max_length, padding=True,
        padding_side="right", return_offsets_mapping=True, return_token_type_ids=True, split_special_tokens=True,
    )  # fmt: skip
    columns = {name: torch.tensor(out[name]) for name in ("input_ids", "attention_mask")}
    context = torch.tensor([[s == 1 for s in encoding.sequence_ids] for encoding in out.encodings])
    columns["answerable"] = context.long()
    columns["answerable"][:, 0] = 1
    segments = torch.tensor(out["token_type_ids"])
    if segments.any():  # BERT's tokenizer tells the two apart, RoBERTa's does not
        columns["token_type_ids"] = segments
    shift = torch.tensor([len(question) + 1 for question, _ in pairs])
    offsets = (torch.tensor(out["offset_mapping"]) + shift[:, None, None]) * context[:, :, None]
    ends = offsets[:, :, 1].amax(1)
    whole = torch.tensor([len(q) + 1 + len(c.rstrip()) for q, c in pairs])
    return columns, offsets, int(((ends < whole) | long).sum())


def _shortened(tokenizer: Any, questions: list[str], n: int) -> tuple[list[str], Tensor]:
    """Questions of at most n tokens, and which were longer, bool [N]."""
    offsets = tokenizer(
        questions, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )["offset_mapping"]
    long = [len(own) > n for own in offsets]
    cut = [q[: own[n - 1][1]] if is_long else q for q, own, is_long in zip(questions, offsets, long, strict=True)]
    return cut, torch.tensor(long)
