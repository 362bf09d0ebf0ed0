"""Questions from files: where answers stand, what is cut, how domains are split, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from span_world import contexts, squad

from clplatform.stream.base import InMemoryStream
from clplatform.stream.question_answering import question_answering
from clplatform.stream.tokenizer import train_wordpiece
from clplatform.types import IGNORED, ClplatformError

OPTIONS: dict[str, Any] = {
    "name": "mine", "data_dir": "data", "paths": None, "domains": None, "scenario": "domain_incremental", "seed": None,
    "validation_fraction": 0.2, "test_fraction": 0.2, "limit": None, "max_length": 48, "stride": None, "tokenizer_vocab_size": 400,
    "tokenizer_on": "all",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _files() -> None:
    Path("data").mkdir()
    for topic in ("color", "place"):
        Path(f"data/{topic}.json").write_text(
            json.dumps(squad(topic, contexts(topic, 20), impossible=topic == "place"))
        )


def made(**options: Any) -> InMemoryStream:
    return question_answering(**OPTIONS | options)


def refusal(**options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        made(**options)
    return str(caught.value)


def read(stream: InMemoryStream, data: Any) -> list[tuple[str, list[str], str | None]]:
    """What is read, the references, and the text between the labels (None: no labels)."""
    batch, found = data.fetch(torch.arange(len(data))), []
    for i, (a, b) in zip(batch["index"].tolist(), batch["labels"].tolist(), strict=True):
        text, references = stream.texts[i]
        answer = None if a == IGNORED else text[stream.offsets[i, a, 0] : stream.offsets[i, b, 1]].strip()
        found.append((text, references, answer))
    return found


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_labels_are_the_tokens_of_the_first_answer(kind: str) -> None:
    texts = [c for t in ("color", "place") for c in contexts(t, 20)]
    stream = made(tokenizer=None if kind == "bpe" else train_wordpiece(texts, 120))
    for e in stream:
        assert (len(e.train), len(e.validation or ()), len(e.test)) == ((12, 4, 4) if e.index == 0 else (24, 8, 8))
        for data in (e.train, e.validation, e.test):
            for text, references, answer in read(stream, data):
                assert answer == references[0]
                assert (answer == "") == text.startswith("what is nothing ?")
    batch = stream[1].train.fetch(torch.arange(24))
    assert ("token_type_ids" in batch) == (kind == "wordpiece")
    unanswered = torch.tensor([r == [""] for _, r, _ in read(stream, stream[1].train)])
    assert (batch["labels"][unanswered] == 0).all() and (batch["labels"][~unanswered] > 0).all()
    assert (batch["answerable"][:, 0] == 1).all()
    opened = batch["answerable"].bool()
    opened[:, 0] = False
    at = torch.stack([stream.offsets[i, : opened.shape[1], 1] for i in batch["index"].tolist()])
    assert torch.equal(opened, at > 0)
    question = [len(stream.texts[i][0].split("\n")[0]) for i in batch["index"].tolist()]
    assert all(row[row > 0].min() > q for row, q in zip(at, question, strict=True))


def test_no_context_is_in_two_splits_and_answers_may_go_over_several_words() -> None:
    document = squad("color", contexts("color", 20))
    for paragraph in document["data"][0]["paragraphs"]:
        words, answer = paragraph["context"].split(), paragraph["qas"][0]["answers"][0]
        answer.update(text=" ".join(words[:3]), answer_start=0)
        paragraph["qas"].append(
            {**paragraph["qas"][0], "question": "again ?", "answers": [answer, {**answer, "text": words[0]}]}
        )
    Path("data/color.json").write_text(json.dumps(document))
    stream = made(domains=["color"])
    seen: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        rows = read(stream, getattr(stream[0], split))
        assert all(answer == references[0] and len(answer.split()) == 3 for _, references, answer in rows if answer)
        assert {len(references) for _, references, _ in rows} == {1, 2}
        seen[split] = {text.split("\n")[1] for text, _, _ in rows}
    assert not (seen["train"] & seen["test"] | seen["train"] & seen["validation"] | seen["validation"] & seen["test"])


def test_an_answer_that_is_cut_away_is_counted_and_not_trained_on() -> None:
    long = {t: [f"{c} {'filler ' * 20}" for c in contexts(t, 10)] + [f"{'filler ' * 20} {c}" for c in contexts(t, 10)]
            for t in ("color", "place")}  # fmt: skip
    for topic, texts in long.items():
        Path(f"data/{topic}.json").write_text(json.dumps(squad(topic, texts)))
    stream = made(max_length=24)
    assert [len(e.train) for e in stream] == [10, 10]
    lost = [answer for _, _, answer in read(stream, stream[0].test)]
    assert lost == [None] * 4 and len(stream[0].test) == 4
    assert "40 of 40 questions and contexts are cut to stream.max_length=24 tokens" in stream.notes
    assert "4 of 40 training answers are cut away, and their questions left out" in stream.notes
    assert "16 of 40 validation and test answers are cut away" in stream.notes
    batch = stream[0].train.fetch(torch.arange(10))
    assert batch["input_ids"].shape[1] == 24


def test_an_answer_of_which_the_end_is_cut_away_is_lost_too() -> None:
    document = squad("color", [f"{c} {'filler ' * 20}" for c in contexts("color", 20)])
    for paragraph in document["data"][0]["paragraphs"]:
        paragraph["qas"][0]["answers"] = [{"text": paragraph["context"].strip(), "answer_start": 0}]
        words = " ".join(paragraph["context"].split()[:4])
        paragraph["qas"].append({"question": "short ?", "answers": [{"text": words, "answer_start": 0}]})
    Path("data/color.json").write_text(json.dumps(document))
    stream = made(domains=["color"], max_length=24)
    assert len(stream[0].train) == 12 and len(stream[0].test) == 8
    assert all(
        text.startswith("short ?") and len(answer.split()) == 4 for text, _, answer in read(stream, stream[0].train)
    )
    assert [answer is None for text, _, answer in read(stream, stream[0].test)] == [True, False] * 4


def test_a_question_that_is_too_long_leaves_half_of_the_places() -> None:
    document = squad("color", contexts("color", 20))
    for paragraph in document["data"][0]["paragraphs"]:
        paragraph["qas"][0]["question"] = "why " * 60
    Path("data/color.json").write_text(json.dumps(document))
    stream = made(domains=["color"], max_length=40)
    batch = stream[0].train.fetch(torch.arange(12))
    assert (batch["answerable"].sum(1) > 4).all()
    assert all(answer == references[0] for _, references, answer in read(stream, stream[0].train))


def test_a_folder_with_files_for_the_splits() -> None:
    Path("data/squad").mkdir()
    for split, n in (("train-v1.1", 10), ("dev-v1.1", 5)):
        Path(f"data/squad/{split}.json").write_text(json.dumps(squad("shape", contexts("shape", n))))
    stream = made(domains=["squad", "color"])
    assert [e.name for e in stream] == ["squad", "color"]
    assert (len(stream[0].train), len(stream[0].validation or ()), len(stream[0].test)) == (8, 2, 5)
    stream = made(paths=["data/squad"], limit=3)
    assert len(stream[0].train) == 3 and "stream.limit keeps 3 of 8 training questions of squad" in stream.notes
    assert not any("keeps" in note for note in made(paths=["data/squad"], limit=8).notes)
    assert [e.name for e in made()] == ["color", "place", "squad"]
    assert [e.task_label for e in made(scenario="task_incremental")] == [0, 1, 2]


def test_files_that_are_not_used_are_noted() -> None:
    Path("data/squad").mkdir()
    for stem in ("train-v1.1", "dev-v1.1", "extra"):
        Path(f"data/squad/{stem}.json").write_text(json.dumps(squad("shape", contexts("shape", 5))))
    for name in ("squad/LICENSE", "squad/.hidden", ".hidden", "README.md"):
        Path(f"data/{name}").write_text("about")
    notes = made(domains=["squad"]).notes
    assert [note for note in notes if "left out" in note] == [
        "files and folders of data without a .json file are left out: 1 (README.md)",
        "files of squad that are not .json are left out: 1 (LICENSE)",
        "files of squad whose names say no split are left out: 1 (extra.json)",
    ]
    Path("data/squad/extra.json").rename("data/squad/train_dev.json")
    why = "its name says both train and dev, and a file is of one split: rename it"
    assert refusal(domains=["squad"]) == f"data/squad/train_dev.json: {why}"


def test_what_does_not_fit_is_refused() -> None:
    Path("bad").mkdir()

    def bad(value: Any) -> str:
        Path("bad/a.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return refusal(data_dir="bad")

    assert "bad/a.json:1: not JSON" in bad("{")
    assert "bad/a.json: not in SQuAD's format" in bad([1])
    assert "a.json: article 1 has no list 'paragraphs'" in bad({"data": [{}]})
    assert "article 1, paragraph 1: the context is empty" in bad(
        {"data": [{"paragraphs": [{"context": " ", "qas": []}]}]}
    )
    wrong = squad("color", ["the color red"])
    wrong["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 2
    assert "question color0: the answer 'red' is not in the context at answer_start=2" in bad(wrong)
    assert "holds no question" in bad({"data": []})
    assert "there is no 'x' in mine" in refusal(domains=["x"])
    Path("bad/a.json").unlink()
    assert "holds no questions" in refusal(data_dir="bad")
