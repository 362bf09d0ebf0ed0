"""Samples that a language model writes itself: texts drawn token by token, and pairs of source and target made of them.

B  batch    T  tokens    V  vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clplatform.backbone.transformer.generate import distribution
from clplatform.module.mode import eval_mode
from clplatform.types import IGNORED, Batch, InputSpec

if TYPE_CHECKING:
    from clplatform.learner import Learner

BATCH = 128  # texts that are written at once


@dataclass(frozen=True)
class Form:
    """What special tokens a pair's text (source, start, target, end) has: a tokenizer may put the same ones around a source.

    Args:
        n_starts, n_ends: how often the token from which a target starts is in it, and the one that ends a target.
        start, end, pad: their numbers.
        max_source, max_target: tokens, each with its special ones.
    """

    n_starts: int
    n_ends: int
    start: int
    end: int
    pad: int
    max_source: int
    max_target: int

    @classmethod
    def of(cls, batch: Batch, spec: InputSpec) -> Form:
        """The form of a real sample, the first of a batch."""
        assert spec.bos_token_id is not None and spec.eos_token_id is not None and spec.pad_token_id is not None
        assert spec.max_length is not None and spec.max_target_length is not None
        source = batch["input_ids"][0][batch["attention_mask"][0].bool()]
        labels = batch["labels"][0]
        whole = torch.cat([source, batch["decoder_input_ids"][0, :1], labels[labels != IGNORED]])
        count = {
            name: int((whole == token).sum()) for name, token in (("s", spec.bos_token_id), ("e", spec.eos_token_id))
        }
        return cls(
            count["s"], count["e"], spec.bos_token_id, spec.eos_token_id, spec.pad_token_id, spec.max_length,
            spec.max_target_length,
        )  # fmt: skip

    def pair(self, text: list[int]) -> tuple[list[int], list[int]] | None:
        """Source, and target with its end, of a text up to its last end; None: it does not have the form."""
        if text.count(self.start) != self.n_starts or text.count(self.end) != self.n_ends or text[-1] != self.end:
            return None
        place = len(text) - 2 - text[-2::-1].index(self.start)  # of the last start before the end
        source, target = text[:place], text[place + 1 :]
        fits = 0 < len(source) <= self.max_source and 1 < len(target) <= self.max_target
        return (source, target) if fits else None


@torch.no_grad()
def write_samples(
    learner: Learner, form: Form, first: Tensor, *, top_k: int, temperature: float
) -> tuple[Batch, Tensor]:
    """Texts that follow a first token, as columns of a stream of pairs.

    Args:
        first: token from which each text is written, int64 [n].

    Returns:
        `input_ids`, `attention_mask`, `decoder_input_ids`, `decoder_attention_mask` and `labels` of those that have the
        form of a pair, and the place of each of them among the n, int64 [m].
    """
    seed = int(torch.randint(2**62, (), generator=learner.generator))
    generator = torch.Generator(learner.device).manual_seed(seed)
    texts: list[list[int]] = []
    with eval_mode(learner), learner.precision_context():
        for some in first.split(BATCH):
            found = draw(learner.backbone, some.to(learner.device), form, top_k, temperature, generator)
            learner.flops.add(len(some), max(map(len, found)))
            texts += found
    pairs = [form.pair(text) for text in texts]
    kept = [i for i, pair in enumerate(pairs) if pair is not None]
    return columns([pair for pair in pairs if pair is not None], form), torch.tensor(kept, dtype=torch.int64)


def draw(
    backbone: Any, first_B: Tensor, form: Form, top_k: int, temperature: float, generator: torch.Generator
) -> list[list[int]]:
    """Texts up to the last of their ends, without their first token."""
    writing = (
        backbone.decoding(first_B[:, None]) if hasattr(backbone, "decoding") else Again(backbone, first_B[:, None])
    )
    n_ends_B = torch.zeros_like(first_B)
    for _ in range(form.max_source + 1 + form.max_target):
        probabilities_BV = distribution(writing.logits(), temperature=temperature, top_k=top_k)
        tokens_B = torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
        done_B = n_ends_B >= form.n_ends
        writing.append(tokens_B.masked_fill(done_B, form.pad))
        n_ends_B += (tokens_B == form.end) & ~done_B
        if (n_ends_B >= form.n_ends).all():
            break
    return [up_to(text, form.end, form.n_ends) for text in writing.ids_BT[:, 1:].tolist()]


class Again:
    """A text that is written with a model that keeps nothing: all tokens are read again for each new one."""

    def __init__(self, backbone: Any, ids_BT: Tensor) -> None:
        self.backbone, self.ids_BT = backbone, ids_BT

    def logits(self) -> Tensor:
        """Of the next token, float32 [B, V]."""
        batch = {"input_ids": self.ids_BT, "attention_mask": torch.ones_like(self.ids_BT)}
        features = self.backbone.forward(batch)  # past the counter of operations
        return self.backbone.projection(features[:, -1:])[:, 0].float()

    def append(self, tokens_B: Tensor) -> None:
        self.ids_BT = torch.cat([self.ids_BT, tokens_B[:, None]], 1)


def up_to(text: list[int], end: int, n: int) -> list[int]:
    """The text up to its n-th end; the whole text if it has fewer."""
    places = [i for i, token in enumerate(text) if token == end]
    return text[: places[n - 1] + 1] if len(places) >= n else text


def columns(pairs: list[tuple[list[int], list[int]]], form: Form) -> Batch:
    """Sources, and targets with their ends, as a stream of pairs has them."""
    if not pairs:
        return {}
    sources = [torch.tensor(source) for source, _ in pairs]
    targets = [torch.tensor(target) for _, target in pairs]
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    starts = [torch.cat([target.new_tensor([form.start]), target[:-1]]) for target in targets]
    return {
        "input_ids": pad_sequence(sources, batch_first=True, padding_value=form.pad),
        "attention_mask": pad_sequence([torch.ones_like(source) for source in sources], batch_first=True),
        "decoder_input_ids": pad_sequence(starts, batch_first=True, padding_value=form.pad),
        "decoder_attention_mask": (labels != IGNORED).long(),
        "labels": labels,
    }
