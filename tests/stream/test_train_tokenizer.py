"""Byte-level BPE: nothing is lost, the same texts give the same tokenizer; what a problem needs of any tokenizer."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clplatform.stream.tokenizer import load_tokenizer, train_wordpiece
from clplatform.stream.train_tokenizer import special_table, specials, train_bpe, train_tokenizer
from clplatform.types import ClplatformError, Problem

TEXTS = [
    "the cat sat on the mat, and the dog sat too.\n",
    "Über allen Gipfeln ist Ruh'\n",
    "x = [1, 2, 3]\n    y\n",
] * 9


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe(TEXTS, 400, frame=True, tags=["<de>", "<pt_BR>"])


def any_text(source: random.Random) -> str:
    """Characters of all planes, white space and pieces of special tokens among them."""
    kinds = [
        lambda: chr(source.randrange(0x20, 0x7F)),
        lambda: chr(source.randrange(0xD800)),
        lambda: chr(source.randrange(0xE000, 0x110000)),
        lambda: source.choice(
            ["\n", " ", "\r\n", "\t", "\u2028", "e\u0301", "  ", " .", "'s", "👩‍👩‍👧", "\0", "\ufeff"]
        ),
        lambda: source.choice(["<s>", "</s>", "<pad>", "<mask>", "<unk>", "<de>", "<", "ĠĊ"]),
    ]
    return "".join(source.choice(kinds)() for _ in range(source.randrange(25)))


def test_any_text_comes_back(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    source = random.Random(0)
    texts = ["", *TEXTS, *(any_text(source) for _ in range(3000))]
    for t in (tokenizer, again):
        framed, plain = t(texts)["input_ids"], t(texts, add_special_tokens=False)["input_ids"]
        assert t.batch_decode(framed, skip_special_tokens=True) == texts
        assert t.batch_decode(plain) == texts
        assert all(f == [1, *p, 2] for f, p in zip(framed, plain, strict=True))
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_special_tokens_in_a_text_are_text_and_tags_are_tokens(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    ids = tokenizer("<pt_BR> a</s><mask><pad>", add_special_tokens=False)["input_ids"]
    assert not set(ids) & {0, 1, 2, 3, 4}
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<pt_BR>", "Ġa"]
    assert tokenizer.get_vocab()["<pt_BR>"] == len(tokenizer) - 1


def test_what_is_learned_and_how_much() -> None:
    t = train_bpe(TEXTS, 400)
    assert {"the", "Ġthe", "Ġsat"} <= set(t.get_vocab())
    assert t("the")["input_ids"] == t("the", add_special_tokens=False)["input_ids"]  # no frame
    for size in (261, 280):
        assert len(train_bpe(TEXTS, size)) == size
    assert len(train_bpe(TEXTS, 290, tags=["<a>", "<b>"])) == 290
    assert len(train_bpe(TEXTS, 100_000)) < 600  # no more pairs
    with pytest.raises(ClplatformError, match=r"tokenizer_vocab_size=262: byte-level BPE needs 263 or more"):
        train_bpe(TEXTS, 262, tags=["<a>", "<b>"])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_same_texts_give_the_same_tokenizer_in_any_process(kind: str) -> None:
    """Thousands of pairs of the same frequency: ties that a hash table would break at random."""
    script = (
        "import hashlib\n"
        "from clplatform.stream.train_tokenizer import train_tokenizer\n"
        "texts = [f'word{i} {chr(97 + i % 26)}x{i * 7919 % 1000} ' + chr(200 + i * 31 % 900) for i in range(2000)]\n"
        f"tokenizer = train_tokenizer({kind!r}, texts, 3000, problem='causal_lm')\n"
        "print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": seed},
        ).stdout
        for parallel, seed in (("true", "1"), ("false", "2"))
    }  # fmt: skip
    assert len(digests) == 1


# --- what a problem needs


def bare(**names: str) -> Any:
    """A tokenizer of a few words with these special tokens."""
    words = ["[PAD]", "a", "b", *names.values()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


GPT2, T5 = {"bos_token": "E", "eos_token": "E", "pad_token": "E"}, {"eos_token": "E", "pad_token": "P"}
BERT = {"cls_token": "C", "sep_token": "S", "mask_token": "M", "pad_token": "P"}
BART = {"bos_token": "B", "eos_token": "E", "cls_token": "B", "sep_token": "E", "mask_token": "M", "pad_token": "P"}
GEMMA_LIKE = {
    "bos_token": "B",
    "eos_token": "E",
    "cls_token": "C",
    "sep_token": "S",
    "pad_token": "P",
    "mask_token": "M",
}


@pytest.mark.parametrize(
    ("names", "problem", "expected"),
    [
        (GPT2, "causal_lm", "EE"), ({"eos_token": "E", "pad_token": "E"}, "causal_lm", "EE"), (BERT, "causal_lm", "CS"),
        (BART, "seq2seq", "BE"), (T5, "seq2seq", "PE"), (BERT, "seq2seq", "CS"), (BERT, "masked_lm", "CSM"),
        (BART, "masked_lm", "BEM"), (GEMMA_LIKE, "masked_lm", "CSM"), (GEMMA_LIKE, "seq2seq", "BE"),
    ],
)  # fmt: skip
def test_special_tokens_by_the_names_of_model_families(names: Any, problem: Problem, expected: str) -> None:
    tokenizer = bare(**names)
    found = specials(tokenizer, problem)
    ids = [found.bos, found.eos, *([found.mask] if problem == "masked_lm" else [])]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == expected
    assert tokenizer.convert_ids_to_tokens(found.pad) == names["pad_token"]


def test_a_tokenizer_without_what_is_needed() -> None:
    with pytest.raises(ClplatformError, match="stream.problem=masked_lm: the backbone's tokenizer has no mask_token; "):
        specials(bare(**GPT2), "masked_lm")
    with pytest.raises(ClplatformError, match="causal_lm: the backbone's tokenizer has no eos_token and no bos_token;"):
        specials(bare(pad_token="P"), "causal_lm")


def test_ours_have_what_every_problem_needs() -> None:
    problems: list[Problem] = ["causal_lm", "masked_lm", "seq2seq"]
    for problem in problems:
        t = train_tokenizer("bpe", TEXTS, 300, problem=problem)
        assert specials(t, problem) == type(specials(t, problem))(pad=0, bos=1, eos=2, mask=4)
        assert len(t("a")["input_ids"]) == (1 if problem == "causal_lm" else 3)
    w = train_tokenizer("wordpiece", TEXTS, 300, problem="masked_lm")
    assert w.backend_tokenizer.to_str() == train_wordpiece(TEXTS, 300).backend_tokenizer.to_str()  # type: ignore[attr-defined]
    assert special_table(w).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
