"""The tokenizer that `tokenizer=…` chooses, instead of the backbone's or one trained on the stream: one that there is, or
one trained on a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clplatform.stream.plain_text import is_text, read_plain, text_files_in
from clplatform.stream.tokenizer import load_tokenizer
from clplatform.stream.train_tokenizer import TITLES, train_tokenizer
from clplatform.types import ClplatformError

CONFIGURED = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")  # files of a tokenizer in Hugging Face's format


def own_tokenizer(source: str, stream: dict[str, Any]) -> tuple[Any, str]:
    """A tokenizer, and a note for the report.

    Args:
        source: a folder in Hugging Face's format, or an id of its hub; or a text file, or folder of such files, to train one
            on: byte-level BPE, unless the stream's page has `tokenizer_kind`.
        stream: its node of the configuration: what it will be used for, and how large it may be.

    Raises:
        ClplatformError: it cannot be had, or there is no text.
    """
    path = Path(source).expanduser()
    if not path.exists() or any((path / name).is_file() for name in CONFIGURED):
        tokenizer: Any = load_tokenizer(source if not path.exists() else path)
        return tokenizer, f"tokenizer {path.name} with {len(tokenizer)} tokens, chosen by tokenizer=…"
    files = text_files_in(path) if path.is_dir() else [path] if is_text(path) else []
    texts = [text for text in map(read_plain, files) if text.strip()]
    if not texts:
        raise ClplatformError(
            f"tokenizer={source}: neither a tokenizer in Hugging Face's format nor text to train one on"
        )
    kind = stream.get("tokenizer_kind") or "bpe"
    size = stream["tokenizer_vocab_size"]
    tokenizer = train_tokenizer(kind, texts, size, problem=stream.get("problem") or "classification")
    n = sum(map(len, texts))
    return tokenizer, f"{TITLES[kind]} tokenizer with {len(tokenizer)} tokens trained on {path.name} ({n:,} characters)"
