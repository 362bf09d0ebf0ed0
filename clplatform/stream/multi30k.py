"""Multi30k (Elliott et al. 2016): captions of pictures in English, German, French and Czech."""

from __future__ import annotations

from typing import Any

from clplatform.stream.base import InMemoryStream
from clplatform.stream.image_files import data_folder, missing
from clplatform.stream.parallel_text import Files, translation
from clplatform.stream.text_pairs import Limit, MaxLength, PairScenario, Seed, TokenizerOn, VocabSize


def multi30k(
    *, name: str, data_dir: str | None, pairs: list[str], test: str, limit: Limit, evaluation_limit: Limit, tag: bool,
    scenario: PairScenario, seed: Seed, max_length: MaxLength, max_target_length: MaxLength,
    tokenizer_vocab_size: VocabSize, tokenizer_on: TokenizerOn, tokenizer: Any = None,
) -> InMemoryStream:  # fmt: skip
    """Translation by language pair: 29,000 training and 1,014 validation sentences of each.

    The languages' captions are of the same pictures: what is held out in one pair is held out in all.

    Args:
        test: `test_2016_flickr` (1,000 sentences), or another of the published ones, which not all languages have.
        limit, evaluation_limit, tag, tokenizer: see `parallel_text`.

    Raises:
        ClplatformError: the files are missing or malformed.
    """
    folder = data_folder("multi30k", data_dir)
    if folder is None:
        raise missing("multi30k", "train.en, train.de, val.en, …, test_2016_flickr.en, … of task 1 (raw; .gz or not)")
    files = Files("train", "val", test, limit, evaluation_limit, tag)
    return translation(
        name, folder, pairs, None, files, scenario=scenario, seed=seed, validation_fraction=0.0, max_length=max_length,
        max_target_length=max_target_length, vocab_size=tokenizer_vocab_size, on=tokenizer_on, tokenizer=tokenizer,
    )  # fmt: skip
