"""From pairs of texts (what is read, what should be written) to a stream for encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clplatform.data import TensorData
from clplatform.stream.base import InMemoryStream, make_experiences, split_validation, task_label
from clplatform.stream.tokenizer import tokenize
from clplatform.stream.train_tokenizer import Specials, specials, train_tokenizer
from clplatform.types import IGNORED, Batch, InputSpec, StreamInfo

Metric = Literal["exact_match", "rouge_l", "bleu", "chrf"]
PairScenario = Literal["domain_incremental", "task_incremental"]
TokenizerOn = Literal["first", "all"]
Limit = Annotated[int, Ge(1)] | None
Fraction = Annotated[float, Ge(0), Lt(1)]
MaxLength = Annotated[int, Ge(4)]
VocabSize = Annotated[int, Ge(100)]
Seed = Annotated[int, Ge(0)] | None
Reference = str | list[str]
START = "<|answer|>"  # what is added to a vocabulary without a token of its own for it


@dataclass
class Pairs:
    """Texts that are read, and for each what should be written: a text, or several of which the first is trained on."""

    sources: list[str]
    references: list[Reference]

    def __len__(self) -> int:
        return len(self.sources)

    def targets(self) -> list[str]:
        return [r if isinstance(r, str) else r[0] for r in self.references]

    def select(self, rows: Sequence[int]) -> Pairs:
        return Pairs([self.sources[i] for i in rows], [self.references[i] for i in rows])


@dataclass
class Part:
    """The pairs of an experience.

    Args:
        tag: put before every source, with a space between; empty: nothing.
    """

    name: str
    train: Pairs
    validation: Pairs | None
    test: Pairs
    tag: str = ""

    def hold_out(self, fraction: float, seed: int | None) -> None:
        """Move training pairs, chosen at random, to validation, if there are none."""
        if self.validation is None and fraction > 0:
            kept, held = split_validation(torch.zeros(len(self.train), dtype=torch.int64), fraction, seed)
            if len(held):
                self.train, self.validation = self.train.select(kept.tolist()), self.train.select(held.tolist())

    def splits(self) -> dict[str, Pairs]:
        """Those that there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: pairs for name, pairs in named.items() if pairs is not None}

    def read(self, pairs: Pairs) -> list[str]:
        """The sources as the model reads them."""
        return [f"{self.tag} {source}" for source in pairs.sources] if self.tag else pairs.sources


def pair_stream(
    name: str, parts: Sequence[Part], *, metric: Metric, scenario: PairScenario, seed: int | None,
    validation_fraction: float, max_length: int, max_target_length: int, vocab_size: int, on: TokenizerOn,
    tokenizer: Any, notes: Sequence[str] = (),
) -> InMemoryStream:  # fmt: skip
    """An experience for each part. `texts` of the stream has the sources as they are read (with the tag) and the references.

    Args:
        max_length, max_target_length: tokens of a source and of a target, each with its special tokens.
        tokenizer: of the pretrained backbone; None: one is trained.
        notes: facts for the report.

    Raises:
        ClplatformError: the tokenizer lacks a special token.
    """
    notes = list(notes)
    for part in parts:
        part.hold_out(validation_fraction, seed)
        notes += _shared(part)
    if tokenizer is None:
        tokenizer = _pair_tokenizer(parts, on, vocab_size, notes)
    encode = Encode(tokenizer, _specials(tokenizer, notes), max_length, max_target_length)
    data, texts = [], []
    for i, part in enumerate(parts):
        splits: dict[str, TensorData | None] = {"validation": None}
        for split, pairs in part.splits().items():
            splits[split] = encode(part.read(pairs), pairs.targets(), task_label(scenario, i))
            texts += list(zip(part.read(pairs), pairs.references, strict=True))
        data.append(splits)
    info = StreamInfo(
        name=name,
        scenario=scenario,
        problem="seq2seq",
        n_experiences=len(parts),
        classes_per_experience=(0,) * len(parts),
        class_names=(),
        seed=-1 if seed is None else seed,
        input=InputSpec(
            "text",
            vocab_size=len(tokenizer),
            pad_token_id=encode.special.pad,
            max_length=max_length,
            bos_token_id=encode.special.bos,
            eos_token_id=encode.special.eos,
            max_target_length=max_target_length,
        ),
        task_ids=scenario == "task_incremental",
        primary_metric=metric,
    )
    names = [part.name for part in parts]
    experiences = make_experiences(data, [()] * len(parts), scenario, names, vocab_size=len(tokenizer))
    return InMemoryStream(info, experiences, None, tokenizer, [*notes, *encode.notes()], texts)


@dataclass
class Encode:
    """Texts as columns; counts what was cut. Sample ids count up in the order of the calls."""

    tokenizer: Any
    special: Specials
    max_length: int
    max_target_length: int
    n: int = 0
    cut_sources: int = 0
    cut_targets: int = 0

    def __call__(self, sources: list[str], targets: list[str], task: int) -> TensorData:
        columns, cut = tokenize(self.tokenizer, sources, self.max_length)
        n = len(sources)
        index = torch.arange(self.n, self.n + n)
        self.n += n
        self.cut_sources += cut
        return TensorData({**columns, **self._targets(targets), "task_labels": torch.full((n,), task), "index": index})

    def _targets(self, texts: list[str]) -> Batch:
        """`decoder_input_ids` (`bos`, target), `labels` (target, `eos`) and `decoder_attention_mask` [N, T].

        A pretrained model's target has what its own tokenizer adds to one: BART's begins with `<s>`, after the `</s>` from
        which its decoder starts.
        """
        pretrained = _starts(self.tokenizer) is not None
        given = {"text_target": texts} if pretrained else {"text": texts}
        ids = self.tokenizer(
            **given,
            add_special_tokens=pretrained,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        bos, eos, longest = self.special.bos, self.special.eos, self.max_target_length - 1
        ids = [i[:-1] if i and i[-1] == eos else i for i in ids]
        self.cut_targets += sum(len(i) > longest for i in ids)
        rows = [i[:longest] for i in ids]
        labels = _padded([torch.tensor([*row, eos]) for row in rows], IGNORED)
        return {
            "decoder_input_ids": _padded([torch.tensor([bos, *row]) for row in rows], self.special.pad),
            "labels": labels,
            "decoder_attention_mask": (labels != IGNORED).long(),
        }

    def notes(self) -> list[str]:
        """What the report must say was cut."""
        cut = {
            f"sources are cut to stream.max_length={self.max_length}": self.cut_sources,
            f"targets are cut to stream.max_target_length={self.max_target_length}": self.cut_targets,
        }
        return [f"{count} of {self.n} {what} tokens" for what, count in cut.items() if count]


def _starts(tokenizer: Any) -> int | None:
    """The token from which a pretrained decoder starts; None: the tokenizer was trained here."""
    return getattr(tokenizer, "decoder_start", None)


def _specials(tokenizer: Any, notes: list[str]) -> Specials:
    """The special tokens; `bos` is the one from which a target starts. A tokenizer that has one token for where a text begins
    and where it ends (GPT-2) is given another: behind its end a pretrained model has forgotten the source."""
    found, start = specials(tokenizer, "seq2seq"), _starts(tokenizer)
    if start is not None:
        return replace(found, bos=start)
    if found.bos == found.eos:
        tokenizer.add_special_tokens({"bos_token": START})
        notes.append(
            f"the token {START}, from which a target starts, is added to the {len(tokenizer) - 1} of the backbone"
        )
        found = specials(tokenizer, "seq2seq")
    return found


def _padded(rows: list[Tensor], fill: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=fill)


def _pair_tokenizer(parts: Sequence[Part], on: TokenizerOn, vocab_size: int, notes: list[str]) -> Any:
    """A byte-level BPE tokenizer trained on both sides of the first experience's training pairs, or of all; all tags
    are in it."""
    texts = []
    for part in parts if on == "all" else parts[:1]:
        # A word after a space is not the token that it is without: as the model reads them.
        texts += [f" {source}" if part.tag else source for source in part.train.sources]
        texts += part.train.targets()
    tags = list(dict.fromkeys(p.tag for p in parts if p.tag))
    tokenizer = train_tokenizer("bpe", texts, vocab_size, problem="seq2seq", tags=tags)
    whose = "the first experience's training pairs" if on == "first" else "the training pairs of all experiences"
    notes.append(f"byte-level BPE tokenizer with {len(tokenizer)} tokens trained on {whose}")
    return tokenizer


def _shared(part: Part) -> list[str]:
    """Notes on pairs that are in two splits."""
    found, notes = {s: set(zip(p.sources, p.targets(), strict=True)) for s, p in part.splits().items()}, []
    for split, pairs in found.items():
        for other in list(found)[: list(found).index(split)]:
            if both := len(pairs & found[other]):
                notes.append(f"{part.name}: pairs that are in the {other} and in the {split} split: {both}")
    return notes
