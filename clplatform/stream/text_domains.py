"""Domain-incremental language modelling over plain text: each file or folder of files is a domain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clplatform.stream.base import InMemoryStream
from clplatform.stream.image_files import data_folder, missing
from clplatform.stream.language import (
    Fraction,
    LanguageProblem,
    LanguageScenario,
    Limit,
    MaxLength,
    Seed,
    TokenizerOn,
    VocabSize,
    choose,
    language_stream,
)  # fmt: skip
from clplatform.stream.plain_text import find_domains, name_domains, read_domain
from clplatform.stream.train_tokenizer import Kind
from clplatform.types import ClplatformError


def text_domains(
    *, name: str, problem: LanguageProblem, data_dir: str | None, paths: list[str] | None, domains: list[str] | None,
    scenario: LanguageScenario, seed: Seed, validation_fraction: Fraction, test_fraction: Fraction, limit: Limit,
    max_length: MaxLength, tokenizer_kind: Kind, tokenizer_vocab_size: VocabSize, tokenizer_on: TokenizerOn,
    tokenizer: Any = None,
) -> InMemoryStream:  # fmt: skip
    """Text of any domains, an experience for each.

    What is held out is contiguous and comes from the end of a domain, cut at line ends (training, validation, test), so
    that no text is in two splits; a folder may have files of its own for the splits (`train.txt`, …). The domain's
    documents are joined, and cut into blocks of `max_length` tokens.

    Args:
        paths: each a domain: a file, or a folder of files; as they are, in `data_dir` or in `$CLPLATFORM_DATA`. None: all
            files and folders of `data_dir`.
        domains: names in the order of the experiences; None: all, in the order of `paths` or else of their names, or
            shuffled by `seed`.
        limit: characters of a domain, at most.
        tokenizer: of the pretrained backbone, given by the platform; None: one is trained.

    Raises:
        ClplatformError: there is no text, it is not UTF-8, or too short.
    """
    notes: list[str] = []
    found = name_domains([find_path(p, data_dir) for p in paths]) if paths else find_domains(_folder(data_dir), notes)
    chosen = [
        read_domain(
            title, found[title], limit=limit, validation_fraction=validation_fraction, test_fraction=test_fraction
        )
        for title in choose(list(found), domains, seed, name)
    ]
    return language_stream(
        name, chosen, problem=problem, scenario=scenario, seed=seed, max_length=max_length, kind=tokenizer_kind,
        vocab_size=tokenizer_vocab_size, on=tokenizer_on, tokenizer=tokenizer, notes=notes,
    )  # fmt: skip


def _folder(data_dir: str | None) -> Path:
    folder = data_folder("text_domains", data_dir)
    if folder is None:
        raise missing("text_domains", "a text file, or a folder of text files, for each domain")
    return folder


def find_path(path: str, data_dir: str | None) -> Path:
    """A file or folder as it is, in `data_dir` or in `$CLPLATFORM_DATA`.

    Raises:
        ClplatformError: there is none.
    """
    bases = ["", *([data_dir] if data_dir else []), *([root] if (root := os.environ.get("CLPLATFORM_DATA")) else [])]
    for base in bases:
        if (there := Path(base).expanduser() / Path(path).expanduser()).exists():
            return there
    where = " or ".join(["here", *bases[1:]])
    raise ClplatformError(f"stream.paths: there is no file or folder {path} ({where})")
