"""From domains of plain text to a stream for language modelling: order, tokenizer, blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt

from clplatform.data import TensorData
from clplatform.stream.base import InMemoryStream, make_experiences, resolve_order, task_label
from clplatform.stream.masking import Masking
from clplatform.stream.packing import causal_blocks, framed_blocks, token_row
from clplatform.stream.plain_text import Domain
from clplatform.stream.tokenizer import unknown
from clplatform.stream.train_tokenizer import TITLES, Kind, Specials, special_table, specials, train_tokenizer
from clplatform.types import Batch, ClplatformError, InputSpec, StreamInfo

LanguageProblem = Literal["causal_lm", "masked_lm"]
LanguageScenario = Literal["domain_incremental", "task_incremental"]
TokenizerOn = Literal["first", "all"]
Limit = Annotated[int, Ge(1)] | None
Fraction = Annotated[float, Ge(0), Lt(1)]
MaxLength = Annotated[int, Ge(4)]
VocabSize = Annotated[int, Ge(100)]
Seed = Annotated[int, Ge(0)] | None


def choose(
    known: Sequence[str], wanted: Sequence[str] | None, seed: int | None, what: str, *, key: str = "domains"
) -> list[str]:
    """The names of domains (or what `key` says) in the order of the experiences: those that are wanted, or all of them, shuffled if
    there is a seed.

    Raises:
        ClplatformError: one is wanted that there is not, or twice, or none.
    """
    if wanted is None:
        return [known[i] for i in resolve_order(len(known), seed, None, what)]
    for name in wanted:
        if name not in known:
            raise ClplatformError(f"stream.{key}: there is no {name!r} in {what} (there is: {', '.join(known)})")
        if list(wanted).count(name) > 1:
            raise ClplatformError(f"stream.{key}: {name!r} is there twice")
    if not wanted:
        raise ClplatformError(f"stream.{key}=[]: name one or more; null takes all")
    return list(wanted)


def domain_tokenizer(
    kind: Kind, on: TokenizerOn, vocab_size: int, domains: Sequence[Domain], problem: LanguageProblem, notes: list[str]
) -> Any:
    """A tokenizer trained on the first experience's training text, or on that of all."""
    texts = [text for domain in (domains if on == "all" else domains[:1]) for text in domain.train]
    tokenizer = train_tokenizer(kind, texts, vocab_size, problem=problem)
    whose = "the first experience's training text" if on == "first" else "the training text of all experiences"
    notes.append(f"{TITLES[kind]} tokenizer with {len(tokenizer)} tokens trained on {whose}")
    return tokenizer


@dataclass
class Blocks:
    """Cuts the text of a split into blocks with the columns that the problem has.

    Sample ids count up over all splits, in the order of the calls.
    """

    tokenizer: Any
    problem: LanguageProblem
    special: Specials
    max_length: int
    masking: Masking | None
    start: int = 0
    left_out: int = 0  # blocks of which nothing can be predicted

    def __call__(self, documents: list[str], task: int) -> TensorData | None:
        """The blocks of these documents; None, if they hold no token that could be predicted."""
        row = token_row(self.tokenizer, documents, self.special.eos)
        if len(row) < 2:
            return None
        columns = self._columns(row)
        n = len(columns["attention_mask"])
        if n == 0:
            return None
        index = torch.arange(self.start, self.start + n)
        self.start += n
        if self.masking is not None:
            columns |= self.masking.fixed(columns["original_ids"], columns["attention_mask"], index)
        return TensorData({**columns, "task_labels": torch.full((n,), task), "index": index})

    def _columns(self, row: Any) -> Batch:
        if self.masking is None:
            return causal_blocks(row, self.max_length, self.special.pad)
        columns = framed_blocks(row, self.max_length, self.special.bos, self.special.eos, self.special.pad)
        words = (~self.masking.special[columns["original_ids"]] & columns["attention_mask"].bool()).any(1)
        self.left_out += int((~words).sum())
        return {name: column[words] for name, column in columns.items()}


def language_stream(
    name: str, domains: Sequence[Domain], *, problem: LanguageProblem, scenario: LanguageScenario, seed: int | None,
    max_length: int, kind: Kind, vocab_size: int, on: TokenizerOn, tokenizer: Any, notes: Sequence[str] = (),
) -> InMemoryStream:  # fmt: skip
    """An experience for each domain.

    Args:
        tokenizer: of the pretrained backbone; None: one is trained.
        notes: facts for the report.

    Raises:
        ClplatformError: the tokenizer lacks a special token, or a split of a domain is too short.
    """
    notes = [*notes, *(note for d in domains for note in d.notes), _sizes(domains)]
    if tokenizer is None:
        tokenizer = domain_tokenizer(kind, on, vocab_size, domains, problem, notes)
    special = specials(tokenizer, problem)
    masking = None
    if problem == "masked_lm":
        assert special.mask is not None
        masking = Masking(special_table(tokenizer), special.mask)
    blocks = Blocks(tokenizer, problem, special, max_length, masking)
    parts: list[dict[str, TensorData | None]] = []
    for i, domain in enumerate(domains):
        part = {s: blocks(getattr(domain, s), task_label(scenario, i)) for s in ("train", "validation", "test")}
        notes += _lost(domain, part, blocks, tokenizer)
        for split in ("train", "test"):
            if part[split] is None:
                raise ClplatformError(f"the {split} text of the domain {domain.name!r} has no token to predict")
        parts.append(part)
    info = StreamInfo(
        name=name,
        scenario=scenario,
        problem=problem,
        n_experiences=len(parts),
        classes_per_experience=(0,) * len(parts),
        class_names=(),
        seed=-1 if seed is None else seed,
        input=InputSpec(
            "text",
            vocab_size=len(tokenizer),
            pad_token_id=special.pad,
            max_length=max_length,
            bos_token_id=special.bos,
            eos_token_id=special.eos,
            mask_token_id=special.mask if problem == "masked_lm" else None,
        ),
        task_ids=scenario == "task_incremental",
        primary_metric="perplexity",
        higher_is_better=False,
    )
    names = [d.name for d in domains]
    experiences = make_experiences(parts, [()] * len(parts), scenario, names, vocab_size=len(tokenizer))
    return InMemoryStream(info, experiences, masking, tokenizer, notes)


def _lost(domain: Domain, part: dict[str, TensorData | None], blocks: Blocks, tokenizer: Any) -> list[str]:
    """What the report must say of a domain that the tokenizer does not know."""
    key = "input_ids" if blocks.masking is None else "original_ids"
    notes = []
    for split in ("train", "test"):
        if (data := part[split]) is not None:
            columns = data.fetch(torch.arange(len(data)))
            notes += unknown(tokenizer, columns[key], columns["attention_mask"], f"{split} blocks of {domain.name}")
    if blocks.left_out:
        notes.append(f"{blocks.left_out} blocks of {domain.name} are left out: the tokenizer knows no token of them")
        blocks.left_out = 0
    return notes


def _sizes(domains: Sequence[Domain]) -> str:
    """How much text there is, in UTF-8."""
    sizes = []
    for d in domains:
        n = [sum(len(text.encode()) for text in part) for part in (d.train, d.validation, d.test)]
        sizes.append(f"{d.name} {n[0]:,} / {n[1]:,} / {n[2]:,}")
    return f"bytes of training / validation / test text: {', '.join(sizes)}"
