"""Translation between languages, from files that are aligned line by line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplatform.stream.base import InMemoryStream, resolve_order
from clplatform.stream.notes import limited
from clplatform.stream.plain_text import read_plain
from clplatform.stream.text_pairs import (
    Fraction,
    Limit,
    MaxLength,
    Pairs,
    PairScenario,
    Part,
    Seed,
    TokenizerOn,
    VocabSize,
    pair_stream,
)
from clplatform.types import ClplatformError


def parallel_text(
    *, name: str, data_dir: str, pairs: list[str], domains: list[str] | None, train: str, validation: str | None,
    test: str, limit: Limit, evaluation_limit: Limit, tag: bool, scenario: PairScenario, seed: Seed,
    validation_fraction: Fraction, max_length: MaxLength, max_target_length: MaxLength,
    tokenizer_vocab_size: VocabSize, tokenizer_on: TokenizerOn, tokenizer: Any = None,
) -> InMemoryStream:  # fmt: skip
    """Translation by language pair, by domain, or both: an experience for each pair of each domain.

    Args:
        data_dir: folder with a file `<train>.<language>` for each language (or `….gz`), and so for the other splits.
        pairs: source and target language of each experience, such as `en-de`.
        domains: folders in `data_dir`, each with such files, in the order of the experiences.
        limit, evaluation_limit: pairs of training, and of validation and test, that each experience has at most: the first.
        tag: the source begins with the target language (`<de>`), a token of a trained tokenizer, text for others.
        tokenizer: of the pretrained backbone, given by the platform; None: one is trained.

    Raises:
        ClplatformError: a file is missing, not UTF-8, or has another number of lines than its other language.
    """
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ClplatformError(f"stream.data_dir={data_dir}: there is no such folder")
    files = Files(train, validation, test, limit, evaluation_limit, tag)
    return translation(
        name, folder, pairs, domains, files, scenario=scenario, seed=seed, validation_fraction=validation_fraction,
        max_length=max_length, max_target_length=max_target_length, vocab_size=tokenizer_vocab_size, on=tokenizer_on,
        tokenizer=tokenizer,
    )  # fmt: skip


@dataclass
class Files:
    """The names of the splits' files without the language, and what is taken of them."""

    train: str
    validation: str | None
    test: str
    limit: int | None
    evaluation_limit: int | None
    tag: bool

    def part(self, title: str, folder: Path, source: str, target: str, notes: list[str]) -> Part:
        """The pairs of an experience."""

        def first(stem: str, setting: str, limit: int | None, split: str) -> Pairs:
            there = read_pairs(folder, stem, source, target, notes)
            kept = there.select(range(len(there))[:limit])
            notes.extend(limited(setting, len(kept), len(there), f"{split} pairs of {title}"))
            return kept

        evaluation = ("evaluation_limit", self.evaluation_limit)
        train = first(self.train, "limit", self.limit, "training")
        validation = first(self.validation, *evaluation, "validation") if self.validation else None
        test = first(self.test, *evaluation, "test")
        return Part(title, train, validation, test, f"<{target}>" if self.tag else "")


def translation(
    name: str, folder: Path, pairs: Sequence[str], domains: Sequence[str] | None, files: Files, *, seed: int | None,
    **settings: Any,
) -> InMemoryStream:  # fmt: skip
    """The stream of these pairs in these domains."""
    stems = [s for s in (files.train, files.validation, files.test) if s]
    if len(set(stems)) < len(stems):
        raise ClplatformError(f"stream: one file cannot be two of the splits ({', '.join(stems)}): give others")
    languages, notes = [split_pair(pair) for pair in pairs], []
    if not pairs or len(set(pairs)) < len(pairs) or (domains is not None and len(set(domains)) < len(domains)):
        raise ClplatformError("stream.pairs, stream.domains: name each once, and one pair at least")
    plan = [
        (" ".join(([d] if d else []) + ([p] if len(pairs) > 1 or not d else [])), folder / d, source, target)
        for d in (domains or [""])
        for p, (source, target) in zip(pairs, languages, strict=True)
    ]
    parts = [files.part(*plan[i], notes) for i in resolve_order(len(plan), seed, None, name)]
    return pair_stream(name, parts, metric="bleu", seed=seed, notes=notes, **settings)


def split_pair(pair: str) -> tuple[str, str]:
    """Source and target language of `en-de`."""
    languages = pair.split("-")
    if len(languages) != 2 or not all(re.fullmatch(r"\w+", x) for x in languages) or languages[0] == languages[1]:
        raise ClplatformError(f"stream.pairs: {pair!r} is no pair of languages such as en-de")
    return languages[0], languages[1]


def read_pairs(folder: Path, stem: str, source: str, target: str, notes: list[str]) -> Pairs:
    """The pairs of two files; those with an empty line are left out, with a note.

    Raises:
        ClplatformError: the files have different numbers of lines, or hold no pair.
    """
    files = [find_file(folder, stem, language) for language in (source, target)]
    a, b = map(read_lines, files)
    if len(a) != len(b):
        shorter = files[0] if len(a) < len(b) else files[1]
        raise ClplatformError(
            f"{files[0]} has {len(a)} lines, {files[1]} {len(b)}: line by line, one is the translation of the other, and "
            f"{shorter} has no line {min(len(a), len(b)) + 1}"
        )
    whole = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x and y]
    if not whole:
        raise ClplatformError(f"{files[0]} and {files[1]} hold no pair of lines")
    if len(whole) < len(a):
        i = min(set(range(len(a))) - set(whole))
        first = f"{files[0] if not a[i] else files[1]}:{i + 1}"
        notes.append(
            f"{len(a) - len(whole)} of {len(a)} {stem} pairs {source}-{target} with an empty line are left out ({first}, …)"
        )
    return Pairs([a[i] for i in whole], [b[i] for i in whole])


def read_lines(file: Path) -> list[str]:
    """The lines of a text file without white space around them. Only line feeds end a line: other separators may stand
    within one."""
    lines = read_plain(file).split("\n")
    return [line.strip() for line in (lines if lines[-1] else lines[:-1])]


def find_file(folder: Path, stem: str, language: str) -> Path:
    """`<stem>.<language>`, compressed or not, in the folder or in its `raw`.

    Raises:
        ClplatformError: there is none; with the languages that there are.
    """
    places = [folder, folder / "raw"]
    for place in places:
        for end in ("", ".gz"):
            if (path := place / f"{stem}.{language}{end}").is_file():
                return path
    there = {
        f.name.removesuffix(".gz")[len(stem) + 1 :]
        for p in places
        if p.is_dir()
        for f in p.glob(f"{stem}.*")
        if f.is_file()
    }
    hint = (
        f"there is {stem} in the languages {', '.join(sorted(there))}"
        if there
        else "a file for each language is needed"
    )
    raise ClplatformError(f"{folder} has no file {stem}.{language} (or {stem}.{language}.gz): {hint}")
