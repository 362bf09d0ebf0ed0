"""Language modelling over text that every Python installation carries: no data set is needed."""

from __future__ import annotations

import ast
import inspect
import platform
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clplatform.data import derive_seed
from clplatform.stream.base import InMemoryStream
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
)
from clplatform.stream.plain_text import cut, split
from clplatform.stream.train_tokenizer import Kind
from clplatform.types import ClplatformError

WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_text(
    *, name: str, problem: LanguageProblem, domains: list[str] | None, scenario: LanguageScenario, seed: Seed,
    validation_fraction: Fraction, test_fraction: Fraction, limit: Limit, max_length: MaxLength, tokenizer_kind: Kind,
    tokenizer_vocab_size: VocabSize, tokenizer_on: TokenizerOn, tokenizer: Any = None,
) -> InMemoryStream:  # fmt: skip
    """Four domains: `manual` (the language reference, which `help()` shows), `code` (the standard library without its
    comments and docstrings), `docstrings` (of the standard library), `unicode` (characters with their names).

    The text is the same for the same version of Python; the notes say which, and how much. What is held out is
    contiguous, see `text_domains`.

    Args:
        domains: names in the order of the experiences; None: all, in the order above or shuffled by `seed`.
        limit: characters of a domain, at most.
        tokenizer: of the pretrained backbone, given by the platform; None: one is trained.

    Raises:
        ClplatformError: this Python has no source code of its library, or there is too little text.
    """
    chosen = []
    for title in choose(list(DOMAINS), domains, seed, name):
        notes: list[str] = []
        chosen.append(split(title, documents(title, limit, notes), validation_fraction, test_fraction, notes))
    note = f"text of Python {platform.python_version()} (Unicode {unicodedata.unidata_version})"
    return language_stream(
        name, chosen, problem=problem, scenario=scenario, seed=seed, max_length=max_length, kind=tokenizer_kind,
        vocab_size=tokenizer_vocab_size, on=tokenizer_on, tokenizer=tokenizer, notes=[note],
    )  # fmt: skip


def documents(domain: str, limit: int | None, notes: list[str]) -> list[str]:
    """The documents of a domain, no more than are needed for `limit` characters; a note says if there are more. How many
    is not counted: to read all of the standard library would take longer than to learn from its beginning."""
    found, n = [], 0
    texts = DOMAINS[domain]()
    for text in texts:
        found.append(text)
        n += len(text)
        if limit is not None and n >= limit:
            break
    kept, rest = cut(found, limit)
    if rest or next(texts, None) is not None:
        notes.append(f"stream.limit keeps {sum(map(len, kept)):,} characters of {domain}, of which there are more")
    return kept


def _manual() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name].strip() + "\n" for name in sorted(topics))


def _sources(convert: Callable[[ast.Module], str]) -> Iterator[str]:
    """The modules of the standard library, the public ones first, each converted to text."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [f for f in sorted(folder.glob("*.py"), key=_private_last) if f.stem in sys.stdlib_module_names]
    if not files:
        raise ClplatformError(f"{folder} holds no source code: leave code and docstrings out of stream.domains")
    for file in files:
        text = convert(ast.parse(file.read_bytes()))
        if text.strip():
            yield text


def _private_last(file: Path) -> tuple[bool, str]:
    return file.stem.startswith("_"), file.stem


def _code(tree: ast.Module) -> str:
    """The code without comments and docstrings, laid out in one way."""
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]  # type: ignore[assignment]
    return ast.unparse(tree) + "\n"


def _docstrings(tree: ast.Module) -> str:
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, WITH_DOCSTRING)]
    return "".join(inspect.cleandoc(text) + "\n\n" for text in found if text)


def _unicode() -> Iterator[str]:
    """A line for each character that has a name of its own, in an order that is random and always the same."""
    named = [(chr(k), unicodedata.name(chr(k), "")) for k in range(0x20, 0xD800)]
    lines = [f"{c} {name.lower()}\n" for c, name in named if name and not name.startswith(("CJK ", "HANGUL SYLL"))]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(derive_seed("unicode")))
    return iter(["".join(lines[i] for i in order.tolist())])


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "manual": _manual,
    "code": partial(_sources, _code),
    "docstrings": partial(_sources, _docstrings),
    "unicode": _unicode,
}
