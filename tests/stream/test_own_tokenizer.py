"""`tokenizer=…`: one that there is, one trained on a corpus, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import call, only_run, refused
from composed import BERT, SMALL, text_stream

from clplatform.files import read_json
from clplatform.stream.own_tokenizer import own_tokenizer
from clplatform.stream.tokenizer import train_wordpiece
from clplatform.types import ClplatformError

Capture = pytest.CaptureFixture[str]
NODE = {"tokenizer_vocab_size": 300}


def test_it_is_trained_on_the_corpus_alone(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "corpus" / name).write_text("zebras graze beside zebras\n" * 50)
    tokenizer, note = own_tokenizer(str(tmp_path / "corpus"), NODE)
    assert "zebras" in tokenizer.get_vocab() and len(tokenizer) <= 300
    assert note == f"byte-level BPE tokenizer with {len(tokenizer)} tokens trained on corpus (2,700 characters)"
    one, _ = own_tokenizer(str(tmp_path / "corpus" / "a.txt"), NODE)
    assert one("zebras")["input_ids"] == tokenizer("zebras")["input_ids"]
    kind, note = own_tokenizer(
        str(tmp_path / "corpus"), {**NODE, "tokenizer_kind": "wordpiece", "problem": "masked_lm"}
    )
    assert "zebras" in kind.get_vocab() and note.startswith("WordPiece tokenizer")


def test_a_saved_one_is_loaded(tmp_path: Path) -> None:
    train_wordpiece(["salt and sand"] * 3, 200).save_pretrained(tmp_path / "words")
    tokenizer, note = own_tokenizer(str(tmp_path / "words"), NODE)
    assert tokenizer.tokenize("sand") == ["sand"] and note.startswith("tokenizer words with ")


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    for path in (tmp_path, tmp_path / "picture.png"):
        with pytest.raises(
            ClplatformError, match="neither a tokenizer in Hugging Face's format nor text to train one on"
        ):
            own_tokenizer(str(path), NODE)


def test_a_run_with_a_corpus_s_tokenizer_is_used_again(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("play the next song in oslo, please\n" * 30)
    settings = [
        *BERT,
        *SMALL,
        *text_stream(tmp_path),
        "stream.tokenizer_vocab_size=300",
        "strategy=finetuning",
        "threads=1",
    ]
    settings.append(f"tokenizer={tmp_path / 'corpus.txt'}")
    assert call(capsys, *settings).code == 0
    run = only_run()
    notes = read_json(run / "results.json")["notes"]
    assert any("trained on corpus.txt" in note for note in notes) and not any("WordPiece" in note for note in notes)
    (tmp_path / "corpus.txt").unlink()
    (tmp_path / "new.txt").write_text("play some jazz\n")
    assert '"label"' in call(capsys, "predict", str(run), str(tmp_path / "new.txt")).out


def test_what_has_no_use_for_one_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert "has no text; leave it null" in refused(capsys, "tokenizer=corpus.txt")
    said = refused(capsys, *text_stream(tmp_path), "backbone=minilm", "tokenizer=corpus.txt")
    assert "has a tokenizer, whose tokens its weights know" in said
