"""Beam search: the K most likely beginnings of a text are continued side by side.

B  batch    K  beams    T  tokens    V  vocabulary    C = 2K  continuations that are looked at
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from clplatform.backbone.transformer.decoding import Decoding
from clplatform.types import ClplatformError

IMPOSSIBLE = -1e9  # score of a text that is none; finite, so that differences are numbers

Penalty = Literal["power", "gnmt"]


class Beams(NamedTuple):
    """Texts with their prompts, best first, int64 [B, K, T], filled up with `pad`; and their scores [B, K], `IMPOSSIBLE`
    where fewer than K texts have ended."""

    ids_BKT: Tensor
    scores_BK: Tensor


def length_penalty(length: int, alpha: float, kind: Penalty) -> float:
    """What the log probability of a text is divided by, so that short texts do not win for being short.

    power:  length^α                  the mean for α = 1; 1 for α = 0 (Hugging Face)
    gnmt:   (5 + length)^α / 6^α      Wu et al. 2016, Eq. 14
    """
    return length**alpha if kind == "power" else ((5 + length) / 6) ** alpha


@torch.no_grad()
def beam_search(
    decoding: Decoding,
    *,
    n_beams: int,
    max_new_tokens: int,
    end: int | None = None,
    pad: int = 0,
    alpha: float = 1.0,
    penalty: Penalty = "power",
    early_stopping: bool = False,
) -> Beams:
    """The texts with the highest scores that are found (Wu et al. 2016, Eq. 14, without coverage).

        score(Y) = log P(Y) / length_penalty(Y)

    Of the 2K best continuations those that end a text, if among the best K, become candidates, and the best K of
    the others are continued: so K beams stay alive whatever ends.

    Args:
        decoding: texts to continue, from a model's `decoding`.
        n_beams: K.
        max_new_tokens: at most; a beam of this length counts as ended.
        end: token that ends a text; None: none does.
        pad: token that fills up texts that have ended.
        alpha, penalty: see `length_penalty`, of the tokens written, `end` included.
        early_stopping: stop at K ended texts; otherwise when the best beam, at its present length, scores less than the
            worst of them.

    Raises:
        ClplatformError: the model has no positions for so many tokens, or there are no beams.
    """
    if n_beams < 1 or max_new_tokens < 1:
        raise ClplatformError(f"n_beams={n_beams}, max_new_tokens={max_new_tokens}: give 1 or more")
    decoding.check_room(max_new_tokens)
    n_texts, n_prompt = decoding.ids_BT.shape
    ended = Ended(decoding.ids_BT, n_beams, max_new_tokens, pad)
    scores_BK = torch.full((n_texts, n_beams), IMPOSSIBLE, device=decoding.ids_BT.device)
    scores_BK[:, 0] = 0  # the beams begin alike: only one is continued
    decoding.repeat(n_beams)
    first_row_B1 = n_beams * torch.arange(n_texts, device=decoding.ids_BT.device)[:, None]
    for length in range(1, max_new_tokens + 1):
        log_p_BKV = decoding.logits().log_softmax(1).unflatten(0, (n_texts, n_beams)) + scores_BK[:, :, None]
        n_tokens = log_p_BKV.shape[2]
        best_BC, index_BC = log_p_BKV.flatten(1).topk(min(2 * n_beams, n_beams * n_tokens))
        beam_BC, token_BC = index_BC // n_tokens, index_BC % n_tokens
        last = length == max_new_tokens
        ends_BC = torch.full_like(token_BC, last, dtype=torch.bool) if end is None or last else token_BC == end

        divisor = length_penalty(length, alpha, penalty)
        beams_BKT = decoding.ids_BT[:, n_prompt:].unflatten(0, (n_texts, n_beams))
        kept = slice(n_beams)
        texts_BKT = torch.cat([_gather(beams_BKT, beam_BC[:, kept]), token_BC[:, kept, None]], 2)
        possible_BK = best_BC[:, kept] > IMPOSSIBLE / 2  # there may be fewer different beginnings than beams
        ended.add(texts_BKT, best_BC[:, kept] / divisor, ends_BC[:, kept] & possible_BK, early_stopping)

        scores_BK, place_BK = torch.where(ends_BC, best_BC + IMPOSSIBLE, best_BC).topk(n_beams)
        decoding.reorder((first_row_B1 + beam_BC.gather(1, place_BK)).flatten())
        decoding.append(token_BC.gather(1, place_BK).flatten())
        if ended.settled(scores_BK[:, 0] / divisor, early_stopping):
            break
    return ended.beams()


class Ended:
    """The best K ended texts of each row, best first.

    Args:
        prompt_BT: what they begin with.
        n_new: tokens that they may have after it.
    """

    def __init__(self, prompt_BT: Tensor, n_beams: int, n_new: int, pad: int) -> None:
        n_texts, device = len(prompt_BT), prompt_BT.device
        self.prompt_BT, self.pad, self.n_new = prompt_BT, pad, n_new
        self.texts_BKT = torch.full((n_texts, n_beams, n_new), pad, dtype=prompt_BT.dtype, device=device)
        self.lengths_BK = torch.zeros(n_texts, n_beams, dtype=torch.int64, device=device)
        self.scores_BK = torch.full((n_texts, n_beams), IMPOSSIBLE, device=device)
        self.full_BK = torch.zeros(n_texts, n_beams, dtype=torch.bool, device=device)
        self.open_B = torch.ones(n_texts, dtype=torch.bool, device=device)  # can a better text still come?

    def add(self, texts_BKT: Tensor, scores_BK: Tensor, ends_BK: Tensor, early_stopping: bool) -> None:
        """Those of the texts [B, K, tokens written] that end, if the row is open."""
        open_B = self.open_B & ~self.full_BK.all(1) if early_stopping else self.open_B
        ends_BK = ends_BK & open_B[:, None]
        n_written = texts_BKT.shape[2]
        texts_BKT = torch.nn.functional.pad(texts_BKT, (0, self.n_new - n_written), value=self.pad)
        scores = torch.cat([self.scores_BK, torch.where(ends_BK, scores_BK, IMPOSSIBLE)], 1)
        self.scores_BK, place_BK = scores.topk(self.scores_BK.shape[1])
        self.texts_BKT = _gather(torch.cat([self.texts_BKT, texts_BKT], 1), place_BK)
        lengths = torch.cat([self.lengths_BK, torch.full_like(self.lengths_BK, n_written)], 1)
        self.lengths_BK = lengths.gather(1, place_BK)
        self.full_BK = torch.cat([self.full_BK, ends_BK], 1).gather(1, place_BK)

    def settled(self, best_B: Tensor, early_stopping: bool) -> bool:
        """Is the search over for all rows, whose best living beam scores so much?"""
        worst_B = torch.where(self.full_BK, self.scores_BK.amin(1, keepdim=True), IMPOSSIBLE).amin(1)
        self.open_B &= best_B > worst_B
        return not self.open_B.any() or (early_stopping and bool(self.full_BK.all()))

    def beams(self) -> Beams:
        texts_BKT = self.texts_BKT[:, :, : int(self.lengths_BK[self.full_BK].max())]
        texts_BKT = texts_BKT.masked_fill(~self.full_BK[:, :, None], self.pad)
        prompts_BKT = self.prompt_BT[:, None].expand(-1, texts_BKT.shape[1], -1)
        return Beams(torch.cat([prompts_BKT, texts_BKT], 2), self.scores_BK)


def _gather(x_BKT: Tensor, place_BC: Tensor) -> Tensor:
    """Rows [B, C, T] of [B, K, T]."""
    return x_BKT.gather(1, place_BC[:, :, None].expand(-1, -1, x_BKT.shape[2]))
