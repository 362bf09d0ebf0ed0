"""Tokenizers: what is learned from which texts, what is saved, and what `encode` gives against one text at a time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clplatform.stream.tokenizer import encode, load_tokenizer, tokenize, train_wordpiece, unknown
from clplatform.stream.train_tokenizer import train_tokenizer
from clplatform.types import ClplatformError

TEXTS = [
    "transfer money to my savings account", "what is my account balance?", "please transfer 200 dollars", "pay my bill",
    "is there any money in my savings account", "why was my card declined at the café",
] * 3  # fmt: skip
PAIRS = [
    ("pay my bill", "please transfer money to my savings account now"),
    ("why", "is it"),
    ("a b c d e f g h", "i j"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_wordpiece(TEXTS, 300)


# --- training


def test_it_knows_the_words_it_was_trained_on_and_no_others(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    assert {"transfer", "savings", "account", "money", "cafe"} <= set(vocabulary)
    assert tokenizer.tokenize("transfer savings account") == ["transfer", "savings", "account"]
    known = " ".join(TEXTS).lower().replace("é", "e")
    for piece in set(vocabulary) - set(tokenizer.all_special_tokens):
        assert piece.removeprefix("##") in known or len(piece.removeprefix("##")) == 1, piece
    assert "play" not in vocabulary and tokenizer.tokenize("play music") != ["play", "music"]


def test_a_word_never_seen_is_cut_into_pieces_that_spell_it(tokenizer: Any) -> None:
    for word in ("zebra", "xylophone9", "Überquerung", "0123456789", "q"):
        pieces = tokenizer.tokenize(word)
        spelt = "".join(p.removeprefix("##") for p in pieces)
        assert spelt == word.lower().replace("ü", "u")
    assert tokenizer.tokenize("@#!") == ["@", "#", "!"]
    assert tokenizer.tokenize("☃") == ["[UNK]"]


def test_case_and_accents_do_not_matter(tokenizer: Any) -> None:
    assert tokenizer("TRANSFER to the CAFÉ")["input_ids"] == tokenizer("transfer to the cafe")["input_ids"]


def test_special_tokens_come_first_and_frame_texts_and_pairs(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("pay my bill", "why")["input_ids"])
    assert tokens == ["[CLS]", "pay", "my", "bill", "[SEP]", "why", "[SEP]"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@pytest.mark.parametrize("size", [100, 150, 200, 5000])
def test_the_size_is_kept_unless_characters_alone_are_more(size: int) -> None:
    characters = 5 + 36 + 68  # special, within words, at the start of words (and signs)
    n = len(train_wordpiece(TEXTS, size))
    assert n == max(size, characters) if size <= 150 else characters < n <= size


def test_the_same_texts_give_the_same_tokenizer_in_any_process() -> None:
    """Many words of the same frequency: ties that a hash table would break at random."""
    script = (
        "import hashlib\n"
        "from clplatform.stream.tokenizer import train_wordpiece\n"
        "texts = [f'word{i} {chr(97 + i % 26)}x{i * 7919 % 1000}' for i in range(2000)]\n"
        "tokenizer = train_wordpiece(texts, 700)\n"
        "print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())\n"
    )
    command = [sys.executable, "-c", script]
    digests = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(digests) == 1


# --- saving


def encodings(tokenizer: Any) -> str:
    """A digest of the vocabulary and of what many inputs give."""
    given = [*TEXTS, "Zoë's ☃ 日本 zebra\u2028\n\t x", "[MASK] [PAD] ##a", "a" * 150]
    out = [encode(tokenizer, texts, length) for texts in (given, PAIRS) for length in (6, 64)]
    values = [sorted(tokenizer.get_vocab().items()), [{k: v.tolist() for k, v in o.items()} for o in out]]
    values.append([tokenizer.special_tokens_map, tokenizer.pad_token_id, tokenizer.decode(out[0]["input_ids"][0])])
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def test_saved_and_loaded_it_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    before = encodings(tokenizer)  # it was used, so that the last cut and padding are part of what is saved
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    assert encodings(again) == before
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
        tmp_path / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def bare(**special: str) -> Any:
    """A tokenizer of whole words with only these special tokens."""
    words = {word: i for i, word in enumerate(["<end>", "<unk>", "pay", "my", "bill"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def test_without_padding_the_end_of_a_text_fills_up(tmp_path: Path) -> None:
    bare(eos_token="<end>").save_pretrained(tmp_path)
    encoded = encode(load_tokenizer(tmp_path), ["pay my bill", "pay"], 8)
    assert encoded["input_ids"].tolist() == [[2, 3, 4], [2, 0, 0]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    bare().save_pretrained(tmp_path)
    with pytest.raises(
        ClplatformError, match=rf"^backbone\.pretrained={tmp_path}: the tokenizer has no token to fill up"
    ):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ClplatformError, match=rf"pretrained={tmp_path}: the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


# --- encoding


@pytest.mark.parametrize("texts", [TEXTS[:6], PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("max_length", [None, 4, 7, 64])
def test_a_batch_is_each_text_alone_filled_up_on_the_right(tokenizer: Any, texts: Any, max_length: int | None) -> None:
    encoded = encode(tokenizer, texts, max_length)
    assert {(name, t.dtype) for name, t in encoded.items()} == {
        (n, torch.int64) for n in ("input_ids", "attention_mask")
    }
    longest = 0
    for i, text in enumerate(texts):
        parts = (text,) if isinstance(text, str) else text
        one = tokenizer(*parts, truncation=max_length is not None, max_length=max_length)["input_ids"]
        longest = max(longest, len(one))
        fill = encoded["input_ids"].shape[1] - len(one)
        assert encoded["input_ids"][i].tolist() == one + [0] * fill
        assert encoded["attention_mask"][i].tolist() == [1] * len(one) + [0] * fill
    assert encoded["input_ids"].shape == (len(texts), longest)


def test_the_longer_of_a_pair_is_cut_first(tokenizer: Any) -> None:
    ids = encode(tokenizer, [("pay", "please transfer money to my savings account")], 7)["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(ids.tolist())[:4] == ["[CLS]", "pay", "[SEP]", "please"]
    assert ids[-1] == tokenizer.sep_token_id and len(ids) == 7


def test_padding_on_the_left_is_turned(tokenizer: Any) -> None:
    tokenizer.padding_side = "left"
    try:
        assert encode(tokenizer, ["pay my bill", "pay"], 8)["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    finally:
        tokenizer.padding_side = "right"


def test_no_texts(tokenizer: Any) -> None:
    assert {name: t.shape[0] for name, t in encode(tokenizer, [], 8).items()} == {"input_ids": 0, "attention_mask": 0}


@pytest.mark.parametrize("texts", [[*TEXTS, "pay", "pay my bill why is"], PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("max_length", [4, 5, 7, 8, 9, 64])
def test_texts_are_counted_as_cut_when_they_lose_tokens(tokenizer: Any, texts: Any, max_length: int) -> None:
    """A text that just fits is not cut."""
    encoded, cut = tokenize(tokenizer, texts, max_length)
    whole = [len(tokenizer(*((t,) if isinstance(t, str) else t))["input_ids"]) for t in texts]
    assert cut == sum(n > max_length for n in whole)
    assert (max_length in whole) or max_length != 7  # the case that matters is among them
    assert torch.equal(encoded["input_ids"], encode(tokenizer, texts, max_length)["input_ids"])
    assert encoded["attention_mask"].sum(1).tolist() == [min(n, max_length) for n in whole]


def test_tokens_that_are_not_known_are_counted(tokenizer: Any) -> None:
    def said(*texts: str) -> list[str]:
        return unknown(tokenizer, **encode(tokenizer, texts, 16), what="test texts")

    assert said("pay my bill", "why") == []
    assert said("pay ☃ bill", "why ☃ ☃", "pay my bill money") == [
        "30 % of the tokens of the test texts are not known to the tokenizer, in 2 of 3"
    ]
    assert said("☃", "\u200b", "pay") == [
        "50 % of the tokens of the test texts are not known to the tokenizer, in 1 of 3",
        "2 of 3 test texts have no token that the tokenizer knows",
    ]
    tokenizer = train_tokenizer("bpe", TEXTS, 300, problem="causal_lm")
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's
    ids = torch.tensor([[tokenizer.eos_token_id, 70, 71]])
    assert unknown(tokenizer, ids, torch.ones_like(ids), "blocks") == []
