"""Translation from aligned files: which pairs an experience has, its columns, and files that do not fit."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from clplatform.stream.base import InMemoryStream
from clplatform.stream.parallel_text import parallel_text, read_lines, split_pair
from clplatform.stream.tokenizer import train_wordpiece
from clplatform.types import IGNORED, ClplatformError, Data

OPTIONS: dict[str, Any] = {
    "name": "mine", "data_dir": ".", "pairs": ["en-de", "en-fr"], "domains": None, "train": "train", "validation": "val",
    "test": "test", "limit": None, "evaluation_limit": None, "tag": True, "scenario": "domain_incremental", "seed": None,
    "validation_fraction": 0.2, "max_length": 32, "max_target_length": 32, "tokenizer_vocab_size": 340,
    "tokenizer_on": "first",
}  # fmt: skip
WORDS = {"en": "the dog runs", "de": "der Hund läuft", "fr": "le chien court"}
SIZES = {"train": 20, "val": 4, "test": 6}


def write(folder: str = ".", languages: Any = WORDS, **changes: Any) -> None:
    """Aligned files, whose lines say which split they are of; of some the content is given."""
    Path(folder).mkdir(exist_ok=True)
    for split, n in SIZES.items():
        for language in languages:
            lines = "".join(f"{WORDS[language]} {split} {i}\n" for i in range(n))
            text = changes.get(f"{split}_{language}", lines)
            Path(f"{folder}/{split}.{language}").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture(autouse=True)
def _files() -> None:
    write()


def made(**options: Any) -> InMemoryStream:
    return parallel_text(**OPTIONS | options)


def refusal(**options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        made(**options)
    return str(caught.value)


def everything(data: Data | None) -> dict[str, Any]:
    assert data is not None
    return data.fetch(torch.arange(len(data)))


def test_an_experience_for_each_pair() -> None:
    stream = made()
    assert [e.name for e in stream] == ["en-de", "en-fr"]
    assert [[len(d) for d in (e.train, e.validation, e.test)] for e in stream] == [[20, 4, 6]] * 2  # type: ignore[arg-type]
    info = stream.info
    assert (info.problem, info.primary_metric, info.higher_is_better) == ("seq2seq", "bleu", True)
    assert (info.classes_per_experience, info.class_names, info.task_ids) == ((0, 0), (), False)
    assert (info.input.vocab_size, info.input.max_length, info.input.max_target_length) == (
        len(stream.tokenizer),
        32,
        32,
    )
    assert (info.input.pad_token_id, info.input.bos_token_id, info.input.eos_token_id) == (0, 1, 2)
    assert all(e.classes == () and e.n_seen_classes == len(stream.tokenizer) for e in stream)
    for e, language in zip(stream, ("de", "fr"), strict=True):
        for split, data in (("train", e.train), ("val", e.validation), ("test", e.test)):
            for i, index in enumerate(everything(data)["index"].tolist()):
                assert stream.texts[index] == (
                    f"<{language}> {WORDS['en']} {split} {i}",
                    f"{WORDS[language]} {split} {i}",
                )
    ids = torch.cat([everything(d)["index"] for e in stream for d in (e.train, e.validation, e.test)])
    assert sorted(ids.tolist()) == list(range(60)) and len(stream.texts) == 60


@pytest.mark.parametrize("given", [False, True])
def test_columns_of_an_encoder_decoder(given: bool) -> None:
    stream = made(tokenizer=train_wordpiece([f"{w} <de> <fr>" for w in WORDS.values()], 200) if given else None)
    t, spec = stream.tokenizer, stream.info.input
    for e in stream:
        for data in (e.train, e.validation, e.test):
            batch = everything(data)
            for row in range(len(batch["labels"])):
                source, target = stream.texts[int(batch["index"][row])]
                ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
                assert ids == t(source)["input_ids"]
                mask = batch["decoder_attention_mask"][row].bool()
                written, labels = batch["decoder_input_ids"][row], batch["labels"][row]
                words = t(target, add_special_tokens=False)["input_ids"]
                assert written[mask].tolist() == [spec.bos_token_id, *words]
                assert labels[mask].tolist() == [*words, spec.eos_token_id]
                assert (labels[~mask] == IGNORED).all() and (written[~mask] == spec.pad_token_id).all()
    if given:
        assert not any("tokenizer" in note for note in stream.notes)
    else:
        assert {"<de>", "<fr>"} <= set(t.get_vocab())
        first = everything(stream[1].train)["input_ids"][0, :2]
        assert t.convert_ids_to_tokens(first) == ["<s>", "<fr>"]


def test_without_tags_and_with_task_ids() -> None:
    stream = made(tag=False, scenario="task_incremental")
    assert stream.info.task_ids and [e.task_label for e in stream] == [0, 1]
    assert set(everything(stream[1].test)["task_labels"].tolist()) == {1}
    assert stream.texts[0][0] == "the dog runs train 0" and "<de>" not in stream.tokenizer.get_vocab()


def test_domains_and_their_order() -> None:
    for folder in ("law", "news"):
        write(folder, test_en="".join(f"{folder} {i}\n" for i in range(6)))
    stream = made(domains=["news", "law"], pairs=["en-de"])
    assert [e.name for e in stream] == ["news", "law"]
    assert stream.texts[int(everything(stream[1].test)["index"][0])][0] == "<de> law 0"
    stream = made(domains=["news", "law"])
    assert [e.name for e in stream] == ["news en-de", "news en-fr", "law en-de", "law en-fr"]
    orders = {tuple(e.name for e in made(domains=["news", "law"], seed=seed)) for seed in range(6)}
    assert len(orders) > 2


def test_limits_take_the_first_pairs() -> None:
    stream = made(limit=7, evaluation_limit=3)
    assert [[len(d) for d in (e.train, e.validation, e.test)] for e in stream] == [[7, 3, 3]] * 2  # type: ignore[arg-type]
    assert stream.texts[6][0].endswith("train 6")
    assert stream.notes[:3] == [
        "stream.limit keeps 7 of 20 training pairs of en-de",
        "stream.evaluation_limit keeps 3 of 4 validation pairs of en-de",
        "stream.evaluation_limit keeps 3 of 6 test pairs of en-de",
    ]
    assert [note for note in stream.notes if "keeps" in note][3] == "stream.limit keeps 7 of 20 training pairs of en-fr"
    assert not any("keeps" in note for note in made(limit=20, evaluation_limit=6).notes)


def test_validation_is_taken_off_the_training_pairs_where_no_file_has_it() -> None:
    stream = made(validation=None)
    for e in stream:
        assert (len(e.train), len(e.validation or ())) == (16, 4)
        pairs = [stream.texts[i] for d in (e.train, e.validation) for i in everything(d)["index"].tolist()]
        assert len(set(pairs)) == 20 and all(" train " in source for source, _ in pairs)
    assert made(validation=None, validation_fraction=0.0)[0].validation is None
    drawn = {made(validation=None, seed=seed).texts[16][0][5:] for seed in range(6)}
    assert len(drawn) > 1


def test_the_tokenizer_never_sees_later_experiences_or_what_is_held_out() -> None:
    def trained(**options: Any) -> str:
        return made(**options).tokenizer.backend_tokenizer.to_str()

    before, all_before = trained(), trained(tokenizer_on="all")
    write(
        train_fr="tout autre chose\n" * 20,
        val_de="ganz anders\n" * 4,
        test_de="sonst nichts\n" * 6,
        test_en="quite different\n" * 6,
    )
    assert trained() == before
    assert trained(tokenizer_on="all") != all_before
    write(train_de="ganz anderes\n" * 20)
    assert trained() != before


def test_long_texts_are_cut_and_counted() -> None:
    stream = made(max_length=8, max_target_length=6)
    for batch in (everything(e.train) for e in stream):
        assert batch["input_ids"].shape[1] == 8 and (batch["input_ids"] == 2).any(1).all()  # still ended
        assert batch["labels"].shape[1] == 6 and (batch["labels"] == 2).any(1).all()
    t, words = stream.tokenizer, stream.texts
    long = [[len(t(text)["input_ids"]) > limit for text, limit in zip(pair, (8, 7), strict=True)] for pair in words]  # type: ignore[arg-type]
    sources, targets = (sum(column) for column in zip(*long, strict=True))
    assert sources > 0 and targets > 0
    assert stream.notes[-2:] == [
        f"{sources} of 60 sources are cut to stream.max_length=8 tokens",
        f"{targets} of 60 targets are cut to stream.max_target_length=6 tokens",
    ]
    assert not any("cut" in note for note in made().notes)


# --- files that do not fit


def test_other_numbers_of_lines() -> None:
    write(val_de="nur eine\n")
    why = "line by line, one is the translation of the other"
    assert refusal() == f"val.en has 4 lines, val.de 1: {why}, and val.de has no line 2"
    write(val_en="only one\n")
    assert refusal() == f"val.en has 1 lines, val.de 4: {why}, and val.en has no line 2"


def test_lines_that_are_empty_are_left_out_with_a_note() -> None:
    lines = [f"{WORDS['de']} {i}" for i in range(20)]
    lines[3], lines[11] = "", "  "
    write(train_de="\n".join(lines))
    stream = made()
    assert stream.notes[0] == "2 of 20 train pairs en-de with an empty line are left out (train.de:4, …)"
    assert [len(e.train) for e in stream] == [18, 20]
    assert [stream.texts[i][0] for i in (2, 3)] == [f"<de> {WORDS['en']} train {i}" for i in (2, 4)]
    write(test_de="\n" * 6)
    assert refusal() == "test.en and test.de hold no pair of lines"
    write(test_de="", test_en="")
    assert refusal() == "test.en and test.de hold no pair of lines"


def test_languages_and_files_that_are_not_there() -> None:
    assert (
        refusal(pairs=["en-it"])
        == ". has no file train.it (or train.it.gz): there is train in the languages de, en, fr"
    )
    assert refusal(test="test_2016") == (
        ". has no file test_2016.en (or test_2016.en.gz): a file for each language is needed"
    )
    assert refusal(domains=["gone"]).startswith("gone has no file train.en")
    assert refusal(data_dir="gone") == "stream.data_dir=gone: there is no such folder"
    assert refusal(test="val").startswith("stream: one file cannot be two of the splits (train, val, val)")
    for pairs in ([], ["en-de", "en-de"]):
        assert refusal(pairs=pairs).startswith("stream.pairs, stream.domains: name each once")
    for wrong in ("en", "en-en", "en_de", "-de", "a-b-c"):
        with pytest.raises(ClplatformError, match=f"stream.pairs: '{wrong}' is no pair of languages such as en-de"):
            split_pair(wrong)


def test_encodings() -> None:
    write(train_de=("läuft\n" * 3).encode() + "läuft\n".encode("latin-1"))
    assert refusal() == "train.de:4: not UTF-8 (byte 0xe4); save the file in that encoding"


def test_lines_end_with_line_feeds_alone_and_files_may_be_compressed() -> None:
    text = "one\u2028still one\r\ntwo\x0bstill two \n\nfour"
    Path("a.en").write_bytes(b"\xef\xbb\xbf" + text.encode())
    Path("b.en.gz").write_bytes(gzip.compress(text.encode()))
    expected = ["one\u2028still one", "two\x0bstill two", "", "four"]
    assert read_lines(Path("a.en")) == read_lines(Path("b.en.gz")) == expected
    plain = made().texts
    for language in WORDS:
        path = Path(f"train.{language}")
        Path(f"train.{language}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert made().texts == plain


def test_pairs_in_two_splits_are_noted() -> None:
    write(test_de="der Hund läuft train 5\n" * 6, test_en="the dog runs train 5\n" * 6)
    assert "en-de: pairs that are in the train and in the test split: 1" in made().notes
