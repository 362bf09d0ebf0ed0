"""Blocks of a language model against the row of tokens one at a time, and the bytes that they stand for."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from clplatform.stream import packing
from clplatform.stream.packing import TokenRow, causal_blocks, framed_blocks, token_row
from clplatform.stream.train_tokenizer import train_bpe, train_tokenizer
from clplatform.types import IGNORED, ClplatformError

DOCUMENTS = [
    "The cat sat on the mat.\nAnd the dog?\n", "  Über allen Gipfeln\n\nist Ruh'…  \n", "日本語 👩‍👩‍👧 </s> e\u0301",
    "\n \n", "x" * 50,
]  # fmt: skip


def tokenizer_of(kind: str) -> Any:
    return train_tokenizer(kind, DOCUMENTS[:2] * 5, 300, problem="causal_lm")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_bytes_of_a_row_are_those_of_its_text(kind: str) -> None:
    t = tokenizer_of(kind)
    row = token_row(t, DOCUMENTS, 2)
    assert int(row.n_bytes.sum()) == sum(len(d.encode()) for d in DOCUMENTS)
    assert (row.n_bytes >= 0).all()
    ends = (row.ids == 2).nonzero()[:, 0].tolist() if kind == "bpe" else None
    if ends:  # each document's bytes are its own tokens'
        assert len(ends) == len(DOCUMENTS)
        for start, end, text in zip([-1, *ends], ends, DOCUMENTS, strict=False):
            assert t.decode(row.ids[start + 1 : end]) == text
            assert int(row.n_bytes[start + 1 : end + 1].sum()) == len(text.encode())
            assert row.n_bytes[end] == 0


def test_a_token_stands_for_the_bytes_up_to_its_end() -> None:
    t = train_bpe(["ab ab ab ab ab cd cd"], 270)
    row = token_row(t, ["ab cd é日ab"], 2)
    tokens = t.convert_ids_to_tokens(row.ids)
    expected = {"ab": 2, "Ġcd": 3, "Ġ": 1, "Ã": 2, "©": 0, "æ": 3, "Ĺ": 0, "¥": 0, "</s>": 0}
    assert row.n_bytes.tolist() == [expected[token] for token in tokens]
    w = train_tokenizer("wordpiece", ["ab cd"], 300, problem="causal_lm")
    row = token_row(w, [" ab  cd!\n"], 3)
    assert w.convert_ids_to_tokens(row.ids) == ["ab", "cd", "!", "[SEP]"]
    assert row.n_bytes.tolist() == [3, 4, 1, 1]  # the space before, and what comes after the last
    assert token_row(w, ["ab [SEP] [MASK]"], 3).ids.tolist().count(3) == 1  # that are spelt out are text


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_long_documents_are_read_in_pieces_that_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tokenizer_of(kind)
    text = "The cat sat.\nÜber dem Hut\n  x\n" * 40 + "no end"
    whole = token_row(t, [text], 2)
    monkeypatch.setattr(packing, "PIECE", 30)
    cut = token_row(t, [text], 2)
    assert int(cut.n_bytes.sum()) == len(text.encode())
    if kind == "wordpiece":
        assert torch.equal(whole.ids, cut.ids) and torch.equal(whole.n_bytes, cut.n_bytes)
    else:
        assert t.decode(cut.ids[:-1]) == text


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 16, 17, 18, 33])
@pytest.mark.parametrize("size", [4, 8])
def test_every_token_but_the_first_is_predicted_once_from_those_before_it(length: int, size: int) -> None:
    row = TokenRow(torch.arange(100, 100 + length), torch.randint(9, (length,)))
    batch = causal_blocks(row, size, pad=7)
    mask, labels = batch["attention_mask"].bool(), batch["labels"]
    assert labels[mask].tolist() == row.ids[1:].tolist()
    assert batch["input_ids"][mask].tolist() == row.ids[:-1].tolist()
    assert (labels[~mask] == IGNORED).all() and (batch["input_ids"][~mask] == 7).all()
    assert labels.shape == (-(-(length - 1) // size), size)
    assert (mask.long().diff(dim=1) <= 0).all()  # padding at the end only
    assert mask[:-1].all()
    assert int(batch["n_bytes"].sum()) == int(row.n_bytes[1:].sum())
    for i, block in enumerate(batch["n_bytes"].tolist()):
        assert block == int(row.n_bytes[1 + i * size : 1 + (i + 1) * size].sum())
    ids = batch["input_ids"]
    assert torch.equal(ids[1:, 0], labels[:-1, -1])  # blocks share one token


@pytest.mark.parametrize("length", [2, 5, 6, 7, 12, 13, 14])
def test_framed_blocks_hold_every_token_once(length: int) -> None:
    row = TokenRow(torch.arange(100, 100 + length), torch.ones(length, dtype=torch.int64))
    batch = framed_blocks(row, 8, bos=1, eos=2, pad=0)
    ids, mask = batch["original_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (-(-(length - 1) // 6), 8)
    inner = []
    for block, m in zip(ids.tolist(), mask.tolist(), strict=True):
        n = sum(m)
        assert m == [1] * n + [0] * (8 - n)
        assert block[0] == 1 and block[n - 1] == 2 and block[n:] == [0] * (8 - n)
        inner += block[1 : n - 1]
    assert inner == row.ids[:-1].tolist()


def test_random_texts_lose_no_byte() -> None:
    source, t = random.Random(1), tokenizer_of("bpe")
    for _ in range(200):
        texts = ["".join(chr(source.choice([source.randrange(1, 0xD7FF), 10, 32, 0x1F600])) for _ in range(30))] * 2
        row = token_row(t, texts, 2)
        blocks = causal_blocks(row, 8, 0)
        assert int(blocks["n_bytes"].sum()) == sum(len(x.encode()) for x in texts) - int(row.n_bytes[0])


def test_a_slow_tokenizer_is_refused() -> None:
    from transformers import CanineTokenizer

    with pytest.raises(ClplatformError, match=r"the backbone's tokenizer \(CanineTokenizer\) is not a fast one"):
        token_row(CanineTokenizer(), ["one", "two"], eos=1)
