"""Writing token by token: the most likely one, or one drawn at random.

    B  batch    T  tokens    V  vocabulary

The model should be in eval mode. A text ends with the token `end`; what follows it is `pad`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clplatform.backbone.transformer.decoding import Decoding
from clplatform.types import ClplatformError


def greedy(decoding: Decoding, *, max_new_tokens: int, end: int | None = None, pad: int = 0) -> Tensor:
    """The most likely token, again and again.

    Args:
        decoding: texts to continue, from a model's `decoding`.
        max_new_tokens: at most, for each text.
        end: token that ends a text; None: none does.
        pad: token that fills up texts that have ended.

    Returns:
        The texts with their prompts, int64 [B, T], T as the longest needs.

    Raises:
        ClplatformError: the model has no positions for so many tokens.
    """
    return write(decoding, lambda logits_BV: logits_BV.argmax(1), max_new_tokens, end, pad)


def sample(
    decoding: Decoding,
    *,
    max_new_tokens: int,
    end: int | None = None,
    pad: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token drawn at random, again and again; other arguments, result and errors as of `greedy`.

    Args:
        temperature, top_k, top_p: see `distribution`.
        generator: what the tokens are drawn from, on the model's device; None: PyTorch's global generator.
    """

    def draw(logits_BV: Tensor) -> Tensor:
        probabilities_BV = distribution(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
        return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]

    return write(decoding, draw, max_new_tokens, end, pad)


def write(
    decoding: Decoding, choose: Callable[[Tensor], Tensor], max_new_tokens: int, end: int | None, pad: int
) -> Tensor:
    """Add the tokens that `choose` (logits [B, V] → int64 [B]) picks, until all texts have ended."""
    decoding.check_room(max_new_tokens)
    ended_B = torch.zeros(len(decoding.ids_BT), dtype=torch.bool, device=decoding.ids_BT.device)
    for _ in range(max_new_tokens):
        tokens_B = choose(decoding.logits()).masked_fill(ended_B, pad)
        decoding.append(tokens_B)
        if end is not None:
            ended_B |= tokens_B == end
            if ended_B.all():
                break
    return decoding.ids_BT


# -- the distribution that is drawn from ------------------------------------------------------------------------------


def distribution(
    logits_BV: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """softmax(logits / temperature), of the tokens that `top_k` and then `top_p` leave, [B, V].

    Args:
        temperature: > 0; below 1 the likely tokens become more likely.

    Raises:
        ClplatformError: a value is outside of its range.
    """
    if temperature <= 0:
        raise ClplatformError(f"temperature={temperature}: give a number above 0, or use greedy search")
    logits_BV = logits_BV / temperature
    if top_k is not None:
        logits_BV = keep_top_k(logits_BV, top_k)
    if top_p is not None:
        logits_BV = keep_top_p(logits_BV, top_p)
    return logits_BV.softmax(-1)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Only the k most likely tokens, and those as likely as the last of them; −∞ for the others (Fan et al. 2018, § 5.4)."""
    if k < 1:
        raise ClplatformError(f"top_k={k}: give 1 or more")
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Only the nucleus: the smallest set of most likely tokens whose probabilities sum to p or more (Holtzman et al. 2020,
    Eqs. 2–3); −∞ for the others.

        Σ_(x ∈ V⁽ᵖ⁾) P(x) ≥ p
    """
    if not 0 < p <= 1:
        raise ClplatformError(f"top_p={p}: give a number above 0, up to 1")
    sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
    probabilities_BV = sorted_BV.softmax(-1)
    enough_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= p  # before this token the set is complete
    return logits_BV.masked_fill(torch.zeros_like(enough_BV).scatter(-1, order_BV, enough_BV), -torch.inf)
