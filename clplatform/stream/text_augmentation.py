"""Random augmentation of text batches, on token ids and on the batch's device: two of the operations of EDA (Wei & Zou 2019, "EDA:
Easy Data Augmentation Techniques for Boosting Performance on Text Classification Tasks"), which need no dictionary.

    swap      n = max(1, ⌊α l⌋) times two tokens of the text, drawn at random, change places; l: its tokens
    deletion  each token is left out with probability p, but for one of them, drawn at random, if it would be all

Tokens are what the tokenizer makes (EDA's are words), and those that it adds ([CLS], [SEP]) and padding stay where they are. Of a
pair each text is one by itself. What is behind a token that is left out moves up, and `attention_mask` gets shorter.

B  batch    T  tokens
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from clplatform.stream.augmentation import Augmentation
from clplatform.types import Batch

Augment = dict[Literal["deletion", "swap"], Annotated[float, Ge(0), Lt(1)]] | None


def text_augmentation(settings: Augment, tokenizer: Any) -> Augmentation | None:
    """What a stream does to training batches.

    Args:
        settings: p as `deletion` and α as `swap`; 0, or none: not that; None: nothing.
        tokenizer: whose special tokens stay.
    """
    p, alpha = (float((settings or {}).get(name, 0)) for name in ("deletion", "swap"))
    if p == 0 and alpha == 0:
        return None
    names = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
    special = torch.tensor(sorted({i for n in names if (i := getattr(tokenizer, n, None)) is not None}))
    filler = int(tokenizer.pad_token_id)

    def augment(batch: Batch, generator: torch.Generator) -> Batch:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        fixed = torch.isin(ids, special.to(ids.device)) | (mask == 0)
        if alpha > 0:
            ids = swap(ids, fixed, alpha, generator)
        if p > 0:
            ids, mask = delete(ids, mask, fixed, p, filler, generator)
        return {**batch, "input_ids": ids, "attention_mask": mask}

    return augment


def swap(ids: Tensor, fixed: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Ids [B, T] with tokens that have changed places; `fixed` [B, T]: those that stay."""
    text = fixed.cumsum(1)  # which text of a pair a token belongs to
    n_swaps = (alpha * (~fixed).sum(1, dtype=torch.float64)).floor().clamp_min(1)
    rounds = max(1, int(alpha * ids.shape[1]))
    draws = torch.rand(rounds, 2, *ids.shape, generator=generator).to(ids.device)
    for i, (first, second) in enumerate(draws):
        a = first.masked_fill(fixed, -1).argmax(1, keepdim=True)
        other = fixed | (text != text.gather(1, a)) | torch.zeros_like(fixed).scatter(1, a, True)
        b = second.masked_fill(other, -1).argmax(1, keepdim=True)
        idle = (n_swaps <= i)[:, None] | fixed.gather(1, a) | other.gather(1, b)
        b = torch.where(idle, a, b)
        ids = ids.scatter(1, torch.cat([a, b], 1), torch.cat([ids.gather(1, b), ids.gather(1, a)], 1))
    return ids


def delete(
    ids: Tensor, mask: Tensor, fixed: Tensor, p: float, filler: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] without the tokens that were left out; `fixed` [B, T]: those that stay."""
    draw = torch.rand(ids.shape, generator=generator).to(ids.device)
    text = fixed.cumsum(1)
    chance = draw.masked_fill(fixed, -1)
    # The token with the largest draw of a text is the last to go: it goes only where all do, and so it stays.
    last = torch.full((len(ids), ids.shape[1] + 1), -1.0, device=ids.device).scatter_reduce(1, text, chance, "amax")
    kept = (mask > 0) & (fixed | (draw >= p) | (chance == last.gather(1, text)))
    order = (~kept).sort(dim=1, stable=True).indices  # what is kept moves to the left
    mask = kept.gather(1, order).to(mask.dtype)
    return ids.gather(1, order).masked_fill(mask == 0, filler), mask
