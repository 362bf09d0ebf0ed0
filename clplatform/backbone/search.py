"""How a language model chooses the tokens that it writes: the most likely ones, a beam search, or drawn at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clplatform.backbone.transformer.beam import beam_search
from clplatform.backbone.transformer.decoding import Decoding
from clplatform.backbone.transformer.generate import greedy, sample
from clplatform.types import ClplatformError


@dataclass(frozen=True)
class Search:
    """Settings of generation, for our Transformer and Hugging Face's.

    Args:
        beams: that are continued side by side; 1: the most likely token, again and again.
        length_penalty: a text's log probability is divided by its length to this power (of a beam search).
        temperature: tokens are drawn from softmax(logits / temperature); None: nothing is drawn.
        top_k, top_p: among the k most likely tokens, or those that have this much probability together; None: all.
        generator: what tokens are drawn from, on the model's device; None: PyTorch's global one.

    Raises:
        ClplatformError: a value is out of its range, or a beam search is to draw.
    """

    beams: int = 1
    length_penalty: float = 1.0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ClplatformError(f"beams={self.beams}: give 1 or more")
        if not math.isfinite(self.length_penalty):
            raise ClplatformError(f"length_penalty={self.length_penalty:g}: give a number, such as 1")
        if self.temperature is None:
            if self.top_k is not None or self.top_p is not None:
                raise ClplatformError("top_k and top_p are of tokens that are drawn: give a temperature too, such as 1")
            return
        if self.beams > 1:
            raise ClplatformError(
                f"beams={self.beams} and temperature={self.temperature:g}: a beam search draws nothing"
            )
        if not 0 < self.temperature < math.inf:
            raise ClplatformError(
                f"temperature={self.temperature:g}: give a number above 0, or none for the most likely"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ClplatformError(f"top_k={self.top_k}: give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ClplatformError(f"top_p={self.top_p:g}: give a number above 0, up to 1")

    def write(self, decoding: Decoding, *, max_new_tokens: int, end: int | None, pad: int) -> Tensor:
        """Texts with their prompts, int64 [B, T], filled up with `pad` behind `end`."""
        limits = {"max_new_tokens": max_new_tokens, "end": end, "pad": pad}
        if self.temperature is not None:
            drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            return sample(decoding, **limits, **drawn, generator=self.generator)  # type: ignore[arg-type]
        if self.beams == 1:
            return greedy(decoding, **limits)  # type: ignore[arg-type]
        return beam_search(decoding, n_beams=self.beams, alpha=self.length_penalty, **limits).ids_BKT[:, 0]  # type: ignore[arg-type]

    def hugging_face(self) -> dict[str, float | int | bool | None]:
        """The same for a `GenerationConfig`."""
        if self.temperature is not None:
            return {
                "do_sample": True, "num_beams": 1, "temperature": self.temperature, "top_k": self.top_k or 0,
                "top_p": self.top_p or 1.0,
            }  # fmt: skip
        # Without beams a length penalty has no say, and Hugging Face would warn.
        penalty = None if self.beams == 1 else self.length_penalty
        return {"do_sample": False, "num_beams": self.beams, "length_penalty": penalty}
