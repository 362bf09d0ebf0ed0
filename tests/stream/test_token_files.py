"""Tagged words from files: what is read, who annotates what, where labels stand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from span_world import NAMES, sentence, write_conll

from clplatform.stream.base import InMemoryStream
from clplatform.stream.tagged_words import Format, iob2, read_sentences
from clplatform.stream.token_files import token_files
from clplatform.stream.tokenizer import train_wordpiece
from clplatform.stream.train_tokenizer import train_bpe
from clplatform.stream.word_tokens import tokenize_words
from clplatform.types import IGNORED, ClplatformError

FORM = Format("tokens", "tags", None, 0, -1)
OPTIONS: dict[str, Any] = {
    "name": "mine", "train": "train.conll", "validation": None, "test": "test.conll", "tokens_key": "tokens",
    "tags_key": "tags", "experience_key": None, "token_column": 0, "tag_column": -1, "scenario": "class_incremental",
    "n_experiences": 2, "class_order": None, "sentences": "disjoint", "seed": None, "validation_fraction": 0.25,
    "max_length": 64, "tokenizer_vocab_size": 400,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _files() -> None:
    write_conll(Path("train.conll"), list(NAMES), 40)
    write_conll(Path("test.conll"), list(NAMES), 10, 100)


def made(**options: Any) -> InMemoryStream:
    return token_files(**OPTIONS | options)


def refusal(**options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        made(**options)
    return str(caught.value)


def jsonl(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def tags_of(stream: InMemoryStream, data: Any) -> list[tuple[str, list[str]]]:
    """Every sentence with the tags of its words."""
    batch, names = data.fetch(torch.arange(len(data))), stream.info.class_names
    texts = stream.tokenizer.batch_decode(batch["input_ids"].tolist(), skip_special_tokens=True)
    return [
        (text, [names[k] for k in labels if k != IGNORED])
        for text, labels in zip(texts, batch["labels"].tolist(), strict=True)
    ]


# -- who annotates what -----------------------------------------------------------------------------------------------------


def test_sentences_are_held_out_for_the_test_where_no_file_has_it() -> None:
    whole, stream = made(sentences="shared"), made(sentences="shared", test=None, test_fraction=0.25)
    for e, there in zip(stream, whole, strict=True):
        parts = [tags_of(stream, d) for d in (e.train, e.validation, e.test)]
        assert [len(p) for p in parts] == [22, 8, 10]
        everything = [t for d in (there.train, there.validation) for t in tags_of(whole, d)]
        assert sorted(" ".join(tags) for part in parts for _, tags in part) == sorted(
            " ".join(t) for _, t in everything
        )
    files = {"train": [write_conll(Path(f"{n}.conll"), list(NAMES), 20, 40 * i) for i, n in enumerate("ab")]}
    named = made(**files, test=None, test_fraction=0.25, n_experiences=None, scenario="domain_incremental")
    assert [len(e.test) for e in named] == [5, 5]
    assert refusal(test=None).startswith("stream.test is missing: give a file, or stream.test_fraction=0.2")
    assert refusal(test_fraction=0.2).startswith("stream.test_fraction holds samples out where there is no stream.test")


def test_types_come_one_after_another_and_all_else_is_outside() -> None:
    stream = made()
    order = list(dict.fromkeys(t[2:] for i in range(40) for t in sentence(list(NAMES), i)[1] if t != "O"))
    assert stream.info.class_names == ("O", *(f"{p}-{t}" for t in order for p in "BI"))
    assert [e.classes for e in stream] == [(0, 1, 2, 3, 4), (0, 5, 6, 7, 8)]
    assert [e.n_seen_classes for e in stream] == [5, 9]
    assert (stream.info.problem, stream.info.primary_metric) == ("token_classification", "span_f1")
    truth = {" ".join(w): t for w, t in (sentence(list(NAMES), i) for i in [*range(40), *range(100, 110)])}
    for e, own in zip(stream, (order[:2], order[2:]), strict=True):
        assert len(e.train) + len(e.validation or ()) == 20 and len(e.test) == 10
        for data in (e.train, e.validation, e.test):
            for text, tags in tags_of(stream, data):
                assert tags == [t if t[2:] in own else "O" for t in truth[text]]
    numbers = [
        data.fetch(torch.arange(len(data)))["index"] for e in stream for data in (e.train, e.validation, e.test) if data
    ]
    assert len(torch.cat(numbers).unique()) == sum(map(len, numbers))


def test_disjoint_sentences_are_each_in_one_experience_and_shared_ones_in_all() -> None:
    disjoint, shared = made(validation_fraction=0.0), made(validation_fraction=0.0, sentences="shared")
    assert [len(e.train) for e in disjoint] == [20, 20] and [len(e.train) for e in shared] == [40, 40]
    assert [text for text, _ in tags_of(shared, shared[0].train)] == [
        text for text, _ in tags_of(shared, shared[1].train)
    ]
    other = made(validation_fraction=0.0, seed=3)
    assert tags_of(other, other[0].train) != tags_of(disjoint, disjoint[0].train)
    assert [e.name for e in made(class_order=[3, 2, 1, 0])] == [", ".join(reversed(e.name.split(", "))) for e in
                                                              reversed(list(made()))]  # fmt: skip


def test_a_file_or_a_key_for_each_domain() -> None:
    for domain, types in (("news", ["PER", "LOC"]), ("mail", ["PER", "ORG"])):
        Path(domain).mkdir()
        write_conll(Path(domain) / "train.conll", types, 12)
        write_conll(Path(domain) / "test.conll", types, 4, 100)
    options: dict[str, Any] = {"scenario": "domain_incremental", "n_experiences": None}
    both = {s: [f"{d}/{s}.conll" for d in ("news", "mail")] for s in ("train", "test")}
    stream = made(**both, **options)
    assert [e.name for e in stream] == ["news", "mail"]
    names = stream.info.class_names
    assert [{names[k] for k in e.classes if k} for e in stream] == [
        {"B-LOC", "I-LOC", "B-PER", "I-PER"}, {"B-PER", "I-PER", "B-ORG", "I-ORG"},
    ]  # fmt: skip
    rows = {s: [] for s in ("train", "test")}
    for split, files in both.items():
        for domain, file in zip(("news", "mail"), files, strict=True):
            found = read_sentences(file, FORM)
            rows[split] += [
                {"tokens": w, "tags": t, "from": domain} for w, t in zip(found.words, found.tags, strict=True)
            ]
    keyed = made(
        train=jsonl("train.jsonl", rows["train"]),
        test=jsonl("test.jsonl", rows["test"]),
        experience_key="from",
        **options,
    )
    for a, b in zip(stream, keyed, strict=True):
        assert a.name == b.name and tags_of(stream, a.train) == tags_of(keyed, b.train)


def test_parts_of_speech_have_no_outside_and_no_spans() -> None:
    rows = [{"tokens": ["the", "cat", "sat"], "tags": ["DET", "NOUN", "VERB"]}] * 8
    stream = made(train=jsonl("a.jsonl", rows), test=jsonl("b.jsonl", rows), n_experiences=3)
    assert stream.info.class_names == ("DET", "NOUN", "VERB") and stream.info.primary_metric == "token_accuracy"
    assert [tags_of(stream, e.test)[0][1] for e in stream] == [["DET"], ["NOUN"], ["VERB"]]


# -- tags and tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-X I-X O", "O B-X I-X O"),
        ("I-X I-X B-X I-Y", "B-X I-X B-X B-Y"),  # IOB1
        ("S-X B-X E-X S-X", "B-X B-X I-X B-X"),  # IOBES
        ("U-X B-X I-X L-X I-X", "B-X B-X I-X I-X B-X"),  # BILOU
        ("O I-X O I-X", "O B-X O B-X"),
    ],
)
def test_every_scheme_becomes_iob2(tags: str, expected: str) -> None:
    assert iob2(tags.split()) == expected.split()


WORDS = [
    ["unbelievable", "café", "(", "Zürich-Oerlikon", ")", "日本", "x"],
    ["a", "New York", "\u200b", "end"],
    ["one"],
]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_label_stands_at_the_first_sub_token_of_its_word(kind: str) -> None:
    texts = [" ".join(words) for words in WORDS]
    tokenizer: Any = train_bpe(texts, 270, frame=True) if kind == "bpe" else train_wordpiece(["able is in a"], 100)
    columns, begins = tokenize_words(tokenizer, WORDS, 100)
    for words, ids, at in zip(WORDS, columns["input_ids"], begins, strict=True):
        places = {int(w): i for i, w in enumerate(at.tolist()) if w >= 0}
        assert list(places) == sorted(places) and len(places) == int((at >= 0).sum())
        ends = [*list(places.values())[1:], int((ids != tokenizer.pad_token_id).sum()) - 1]
        for (w, start), end in zip(places.items(), ends, strict=True):
            piece = tokenizer.decode(ids[start:end], skip_special_tokens=False).strip()
            if kind == "bpe":
                assert piece == words[w].strip()
        assert (at[:1] == -1).all()
        missing = set(range(len(words))) - set(places)
        assert missing <= ({2} if kind == "wordpiece" else set())  # WordPiece passes over a character of no width


def test_what_is_cut_is_counted() -> None:
    stream = made(max_length=8)
    assert any(
        note.startswith("train: ") and "words are cut off at stream.max_length=8 tokens" in note
        for note in stream.notes
    )
    assert stream[0].train.fetch(torch.arange(4))["input_ids"].shape[1] == 8


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_its_line() -> None:
    Path("bad.conll").write_text("one O\n\nalone\n")
    assert refusal(train="bad.conll").startswith("bad.conll:3: the line has 1 columns ('alone')")
    assert "there is no file none.conll" in refusal(train="none.conll")
    assert refusal(train=jsonl("a.jsonl", [{"tokens": ["a"], "tags": ["O", "O"]}])) == (
        "a.jsonl:1: 1 words and 2 tags; each word needs one"
    )
    assert "the tags are numbers" in refusal(train=jsonl("a.jsonl", [{"tokens": ["a"], "tags": [0]}]))
    assert "a.jsonl:1: 'tokens' is 'a b', not a list" in refusal(
        train=jsonl("a.jsonl", [{"tokens": "a b", "tags": ["O"]}])
    )
    assert "a.jsonl:1: a word is empty" in refusal(train=jsonl("a.jsonl", [{"tokens": [" "], "tags": ["O"]}]))
    Path("other.conll").write_text("Mars B-PLANET\n")
    assert "other.conll:1: the tag 'B-PLANET' is of no type that is trained on" in refusal(test="other.conll")
    assert "both in the train and in the test split" in refusal(test="train.conll")
    assert "stream.n_experiences is missing: say to how many the 4 types" in refusal(n_experiences=None)
    assert "possible are 1, 2, 4" in refusal(n_experiences=3)
    assert "needs domains" in refusal(scenario="domain_incremental")
    assert "has columns without names" in refusal(experience_key="from", n_experiences=None)
    assert "stream.test: give as many files" in refusal(train=["train.conll", "other.conll"], n_experiences=None)
    Path("empty.conll").write_text("\n\n")
    assert "empty.conll holds no sentence" in refusal(train="empty.conll")
