"""The splits of a stream of tagged words, from files that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from clplatform.metric.spans import OUTSIDE
from clplatform.stream.base import split_test
from clplatform.stream.tagged_words import Format, Sentences, iob2, read_sentences, type_of
from clplatform.types import ClplatformError

Files = str | list[str]


def read_splits(
    files: dict[str, Files | None], form: Format, test_fraction: float | None, seed: int | None
) -> dict[str, Sentences]:
    """The sentences of every split that there is; tags that mark spans in IOB2.

    Args:
        files: of each split a file, or a file for each experience; None: there is no such split.
        test_fraction: of each experience's training sentences, which are tested on if there is no test file.

    Raises:
        ClplatformError: a file is missing or malformed, or the splits do not belong together.
    """
    read = {split: _read_files(given, form) for split, given in files.items() if given is not None}
    if "test" not in read:
        read["train"], read["test"] = _hold_out_test(read["train"], test_fraction, seed)
    spans = read["train"].marks_spans()
    _check(read, files)
    if spans:
        for part in read.values():
            part.tags = [iob2(tags) for tags in part.tags]
    return read


def _hold_out_test(train: Sentences, fraction: float | None, seed: int | None) -> tuple[Sentences, Sentences]:
    names = train.experiences or [""] * len(train)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    kept, held = split_test(torch.tensor([number[n] for n in names]), fraction, seed, train.path)
    return train.select(kept.tolist(), train.path), train.select(held.tolist(), f"{train.path} (held out)")


def _read_files(files: Files, form: Format) -> Sentences:
    """The sentences of a file; of several with the names of the files as experiences."""
    if isinstance(files, str):
        return read_sentences(files, form)
    if form.experience or not files:
        raise ClplatformError(
            "stream: give one file with stream.experience_key, or a file for each experience without it"
        )
    parts, names = [read_sentences(f, form) for f in files], _names(files)
    whole = Sentences(", ".join(files), [], [], [], [])
    lines: list[int] = []
    for part, own in zip(parts, names, strict=True):
        whole.words += part.words
        whole.tags += part.tags
        lines += part.lines
        whole.experiences = [*(whole.experiences or []), *[own] * len(part)]
    whole.lines = lines
    return whole


def _names(files: Sequence[str]) -> list[str]:
    """Names of files without their endings; where these are the same, the names of their folders (`news/train.txt`)."""
    stems = [Path(f).name.split(".")[0] for f in files]
    folders = [Path(f).expanduser().resolve().parent.name for f in files]
    for names in (stems, folders):
        if len(set(names)) == len(names):
            return names
    raise ClplatformError(f"stream: the files {', '.join(files)} need different names, or folders of different names")


def _check(read: dict[str, Sentences], files: dict[str, Files | None]) -> None:
    """Refuse one file for two splits, types that are never trained on, and splits of other experiences."""
    seen: dict[Path, str] = {}
    for split, given in files.items():
        for f in [given] if isinstance(given, str) else given or []:
            if (path := Path(f).expanduser().resolve()) in seen:
                raise ClplatformError(f"{f} is both in the {seen[path]} and in the {split} split: give two files")
            seen[path] = split
    train = read["train"]
    known, names = set(train.types()) | {OUTSIDE}, train.experiences
    for split, part in read.items():
        if (part.experiences is None) != (names is None):
            raise ClplatformError(f"stream.{split}: give as many files as stream.train has")
        if names is not None and split != "train" and isinstance(files[split], list):
            # Files are paired by their order: their names may say the split.
            order, own = list(dict.fromkeys(names)), list(dict.fromkeys(part.experiences or []))
            if len(order) != len(own):
                raise ClplatformError(f"stream.{split} has {len(own)} files, stream.train {len(order)}: give as many")
            part.experiences = [order[own.index(e)] for e in part.experiences or []]
        for i, tags in enumerate(part.tags):
            for tag in tags:
                if tag not in known and type_of(tag) not in known:
                    raise ClplatformError(f"{part.where(i)}: the tag {tag!r} is of no type that is trained on")
            if names is not None and (part.experiences or [])[i] not in set(names):
                raise ClplatformError(
                    f"{part.where(i)}: the experience {(part.experiences or [])[i]!r} has no training sentences"
                )
