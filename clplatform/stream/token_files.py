"""Token classification (named entities, chunks, parts of speech) from files of tagged words: new types of entities in every
experience, or another domain.

Where types come one after another, an experience annotates its own ones: all else is `O` (Monaikul et al. 2021, "Continual
Learning for Named Entity Recognition"), also what the model has learned before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from clplatform.data import TensorData, derive_seed
from clplatform.metric.spans import OUTSIDE
from clplatform.stream.base import (
    InMemoryStream,
    check_one_test,
    make_experiences,
    plan_classes,
    resolve_order,
    split_validation,
    task_label,
)
from clplatform.stream.tagged_files import Files, read_splits
from clplatform.stream.tagged_words import Format, Sentences, type_of
from clplatform.stream.train_tokenizer import train_tokenizer
from clplatform.stream.word_tokens import tokenize_words
from clplatform.types import IGNORED, Batch, ClplatformError, InputSpec, Scenario, StreamInfo


@dataclass
class Share:
    """What an experience has: its types, and its sentences of each split."""

    name: str
    types: list[str]
    rows: dict[str, Tensor]


def token_files(
    *, name: str, train: Files, validation: Files | None, test: Files | None, tokens_key: str, tags_key: str,
    experience_key: str | None, token_column: int, tag_column: int, scenario: Scenario,
    n_experiences: Annotated[int, Ge(1)] | None, class_order: list[int] | None, sentences: Literal["disjoint", "shared"],
    seed: Annotated[int, Ge(0)] | None, validation_fraction: Annotated[float, Ge(0), Lt(1)],
    max_length: Annotated[int, Ge(4)], tokenizer_vocab_size: Annotated[int, Ge(100)], tokenizer: Any = None,
    test_fraction: Annotated[float, Gt(0), Lt(1)] | None = None,
) -> InMemoryStream:  # fmt: skip
    """Tagged words in CoNLL columns, JSONL or Parquet.

    Args:
        train, validation, test: a file, or a file for each experience.
        tokens_key, tags_key, experience_key, token_column, tag_column: see `Format`.
        n_experiences: types are dealt to so many; None where files or `experience_key` name the experiences.
        class_order: types in the order of their appearance, as numbers of their first appearance in the training file.
        sentences: where types are dealt, each training sentence belongs to one experience, at random, or to all.
        validation_fraction: of each experience's training sentences, at random, if there is no validation file.
        test_fraction: the same for the test.
        tokenizer: of the pretrained backbone, given by the platform; None: one is trained.

    Raises:
        ClplatformError: a file is missing or malformed, with the line, or the numbers do not fit.
    """
    form = Format(tokens_key, tags_key, experience_key, token_column, tag_column)
    check_one_test(test, test_fraction)
    read = read_splits({"train": train, "validation": validation, "test": test}, form, test_fraction, seed)
    named = read["train"].experiences is not None
    if named:
        if n_experiences is not None or class_order is not None:
            raise ClplatformError(
                "stream: files or stream.experience_key name the experiences: leave stream.n_experiences and "
                "stream.class_order null"
            )
        shares = _by_name(read, seed, name)
    else:
        if scenario == "domain_incremental":
            raise ClplatformError(
                "stream.scenario=domain_incremental needs domains: give a training and a test file for each, or a "
                "stream.experience_key"
            )
        shares = _by_type(read, n_experiences, class_order, sentences, scenario, seed, name)
    if validation is None and validation_fraction > 0:
        _hold_out(shares, validation_fraction, seed)
    return _stream(
        name, read, shares, scenario=scenario, seed=seed, max_length=max_length, vocab_size=tokenizer_vocab_size,
        tokenizer=tokenizer,
    )  # fmt: skip


# -- who has what -------------------------------------------------------------------------------------------------------


def _by_name(read: dict[str, Sentences], seed: int | None, name: str) -> list[Share]:
    """An experience for each name, with the types that its training sentences have."""
    known = list(dict.fromkeys(read["train"].experiences or []))
    shares = []
    for i in resolve_order(len(known), seed, None, name):
        own = {
            split: torch.tensor([r for r, e in enumerate(part.experiences or []) if e == known[i]], dtype=torch.int64)
            for split, part in read.items()
        }
        types = dict.fromkeys(type_of(t) for r in own["train"].tolist() for t in read["train"].tags[r] if t != OUTSIDE)
        if not len(own["test"]):
            raise ClplatformError(f"the experience {known[i]!r} has no test sentences")
        shares.append(Share(known[i], list(types), own))
    return shares


def _by_type(
    read: dict[str, Sentences], n: int | None, order: list[int] | None, sentences: str, scenario: Scenario,
    seed: int | None, name: str,
) -> list[Share]:  # fmt: skip
    """Types dealt to experiences."""
    types = read["train"].types()
    if n is None:
        raise ClplatformError(
            f"stream.n_experiences is missing: say to how many the {len(types)} types ({', '.join(types[:8])}) are dealt"
        )
    plan = plan_classes(types, n, scenario=scenario, seed=seed, class_order=order, what=name)
    every = {split: torch.arange(len(part)) for split, part in read.items()}
    place = torch.zeros(len(read["train"]), dtype=torch.int64)
    if sentences == "disjoint":  # as many in each, whatever types they hold
        generator = torch.Generator().manual_seed(derive_seed(seed or 0, "sentences"))
        place = torch.randperm(len(place), generator=generator) % n
    shares = []
    for i, group in enumerate(plan.groups):
        own = [types[k] for k in group]
        title = ", ".join(own) if len(own) <= 3 else f"experience {i + 1}"
        mine = place == i if sentences == "disjoint" else torch.ones_like(place, dtype=torch.bool)
        shares.append(Share(title, own, {**every, "train": mine.nonzero()[:, 0]}))
    if any(not len(share.rows["train"]) for share in shares):
        raise ClplatformError(f"stream.n_experiences={n}: there are only {len(place)} training sentences")
    return shares


def _hold_out(shares: list[Share], fraction: float, seed: int | None) -> None:
    """Move a part of each experience's training sentences to validation."""
    for share in shares:
        rows = share.rows["train"]
        kept, held = split_validation(torch.zeros_like(rows), fraction, seed)
        share.rows["train"], share.rows["validation"] = rows[kept], rows[held]


# -- the stream ---------------------------------------------------------------------------------------------------------


def _stream(
    name: str, read: dict[str, Sentences], shares: list[Share], *, scenario: Scenario, seed: int | None, max_length: int,
    vocab_size: int, tokenizer: Any,
) -> InMemoryStream:  # fmt: skip
    """Labels in the order of appearance, `O` first; tokens."""
    notes: list[str] = []
    spans, outside = read["train"].marks_spans(), any(OUTSIDE in tags for tags in read["train"].tags)
    order = list(dict.fromkeys(t for share in shares for t in share.types))
    names = [OUTSIDE] * outside + ([f"{p}-{t}" for t in order for p in "BI"] if spans else order)
    if tokenizer is None:
        texts = [" ".join(read["train"].words[r]) for r in shares[0].rows["train"].tolist()]
        tokenizer = train_tokenizer("bpe", texts, vocab_size, problem="token_classification")
        notes.append(
            f"byte-level BPE tokenizer with {len(tokenizer)} tokens trained on the first experience's sentences"
        )
    encoded = {s: _encode(own, names, tokenizer, max_length, f"{s}: ", notes) for s, own in read.items()}
    encoded.setdefault("validation", encoded["train"])  # which it is held out from
    parts, start = [], 0
    for i, share in enumerate(shares):
        part: dict[str, TensorData | None] = {"validation": None}
        table = _table(names, share.types, outside)
        for split, rows in share.rows.items():
            (columns, tags), n = encoded[split], len(rows)
            own = {**{c: values[rows] for c, values in columns.items()}, "labels": table[tags[rows]]}
            more = {"task_labels": torch.full((n,), task_label(scenario, i)), "index": torch.arange(start, start + n)}
            part[split] = TensorData({**own, **more}) if n else None
            start += n
        parts.append(part)
    classes = [tuple(k for k, c in enumerate(names) if c == OUTSIDE or type_of(c) in share.types) for share in shares]
    info = StreamInfo(
        name=name,
        scenario=scenario,
        problem="token_classification",
        n_experiences=len(parts),
        classes_per_experience=tuple(map(len, classes)),
        class_names=tuple(names),
        seed=-1 if seed is None else seed,
        input=InputSpec("text", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_length=max_length),
        task_ids=scenario == "task_incremental",
        primary_metric="span_f1" if spans else "token_accuracy",
    )
    experiences = make_experiences(parts, classes, scenario, [share.name for share in shares])
    return InMemoryStream(info, experiences, None, tokenizer, notes)


def _encode(
    part: Sentences, names: list[str], tokenizer: Any, max_length: int, what: str, notes: list[str]
) -> tuple[Batch, Tensor]:
    """The tokens of sentences, and at each the number of the tag of the word that begins there, from 1 on; 0: none does."""
    columns, begins = tokenize_words(tokenizer, part.words, max_length)
    number = {tag: k + 1 for k, tag in enumerate(names)}
    longest = max(len(tags) for tags in part.tags)
    table = torch.zeros(len(part), longest + 1, dtype=torch.int64)  # the last column is of tokens that begin no word
    for i, tags in enumerate(part.tags):
        table[i, : len(tags)] = torch.tensor([number.get(tag, 0) for tag in tags])
    n_words = sum(map(len, part.words))
    if lost := n_words - int((begins >= 0).sum()):
        notes.append(
            f"{what}{lost} of {n_words} words are cut off at stream.max_length={max_length} tokens, or no tokens"
        )
    return columns, table.gather(1, begins.where(begins >= 0, longest))


def _table(names: list[str], types: list[str], outside: bool) -> Tensor:
    """Tag number (see `_encode`) → label in an experience of these types: what it does not annotate is `O`, or without a
    label where there is no `O`."""
    other = 0 if outside else IGNORED
    labels = [k if c == OUTSIDE or type_of(c) in types else other for k, c in enumerate(names)]
    return torch.tensor([IGNORED, *labels])
