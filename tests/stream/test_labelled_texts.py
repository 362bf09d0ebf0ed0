"""From labelled texts to experiences: rows, labels, what is held out, tokens and the notes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clplatform.stream.base import InMemoryStream, number_classes
from clplatform.stream.labelled_texts import Source, make_source, text_stream
from clplatform.stream.text_files import Texts
from clplatform.stream.tokenizer import encode, train_wordpiece
from clplatform.types import ClplatformError, Data

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]
TOKENIZER = train_wordpiece(
    [f"the {c} number {i} of {split}" for c in CLASSES for i in range(50) for split in ("train", "validation", "test")],
    300,
)


def texts(split: str, per_class: int, labels: list[str] | None = None) -> Texts:
    """Texts that say their split, class and number."""
    rows = [(f"the {c} number {i} of {split}", c) for i in range(per_class) for c in labels or CLASSES]
    return Texts(f"{split}.csv", [t for t, _ in rows], [c for _, c in rows])


def source(*, validation: bool = True, per_class: int = 10) -> Source:
    held_out = texts("validation", 2) if validation else None
    return Source(texts("train", per_class), held_out, texts("test", 3), CLASSES)


def stream(given: Source | None = None, groups: Any = ([5, 0], [3, 1], [2, 4]), *, scenario: Any = "class_incremental",
           **options: Any) -> InMemoryStream:  # fmt: skip
    plan = number_classes([list(g) for g in groups], CLASSES, scenario)
    settings = {"seed": 0, "validation_fraction": 0.2, "max_length": 16, "vocab_size": 300, "tokenizer": TOKENIZER}
    return text_stream("animals", given or source(), plan, scenario, **settings | options)  # type: ignore[arg-type]


def everything(data: Data | None) -> dict[str, Tensor]:
    assert data is not None
    return data.fetch(torch.arange(len(data)))


def said(data: Data | None, tokenizer: Any = TOKENIZER) -> list[str]:
    """The texts, from their tokens."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in everything(data)["input_ids"]]


# --- the source


def test_labels_are_numbered_in_the_order_of_the_training_texts() -> None:
    made = make_source(texts("train", 2, ["dog", "ant"]), None, texts("test", 1, ["ant"]))
    assert made.class_names == ["dog", "ant"]
    assert made.originals("train").tolist() == [0, 1, 0, 1] and made.originals("test").tolist() == [1]
    assert list(made.splits()) == ["train", "test"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_is_never_trained_on_is_named_with_its_line(split: str) -> None:
    parts = {"train": texts("train", 1), "validation": texts("validation", 1), "test": texts("test", 1)}
    parts[split] = Texts("more.csv", ["a", "b"], ["ant", "gnu"], None, [2, 7])
    with pytest.raises(ClplatformError, match=r"^more\.csv:7: the label 'gnu' is not among the training labels$"):
        make_source(**parts)


def test_one_file_cannot_be_two_splits() -> None:
    a, b = texts("train", 1), texts("train", 1)
    b.path = "./folder/../train.csv"
    for parts, names in (
        ((a, None, b), "the train and the test"),
        ((a, b, texts("test", 1)), "the train and the validation"),
    ):
        with pytest.raises(ClplatformError, match=rf"train\.csv is both {names} split: give two"):
            make_source(*parts)


def test_texts_of_two_splits_are_counted_in_the_notes() -> None:
    train, test = texts("train", 3), texts("test", 2)
    test.texts[:3] = [train.texts[0], train.texts[0], train.texts[9]]
    assert make_source(train, None, test).notes == ["texts that are in the train and in the test split: 2"]
    assert stream(make_source(train, None, test)).notes == ["texts that are in the train and in the test split: 2"]


# --- who sees what


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
@pytest.mark.parametrize("validation", [True, False])
def test_every_text_is_in_one_split_of_one_experience_under_its_label(scenario: str, validation: bool) -> None:
    groups = [[5, 0], [3, 1], [2, 4]]
    made = stream(source(validation=validation), groups, scenario=scenario)
    everywhere = []
    for i, e in enumerate(made):
        numbers = [0, 1] if scenario == "domain_incremental" else [2 * i, 2 * i + 1]
        assert e.classes == tuple(numbers) and e.name == ", ".join(CLASSES[k] for k in groups[i])
        assert e.n_seen_classes == (2 if scenario == "domain_incremental" else 2 * i + 2)
        assert e.task_label == (i if scenario == "task_incremental" else 0)
        for split in ("train", "validation", "test"):
            batch = everything(getattr(e, split))
            words = [text.split() for text in said(getattr(e, split))]
            assert [numbers[groups[i].index(CLASSES.index(w[1]))] for w in words] == batch["labels"].tolist()
            from_file = split if validation or split == "test" else "train"
            assert {w[-1] for w in words} == {from_file}
            assert set(batch["task_labels"].tolist()) == {e.task_label}
            everywhere += batch["index"].tolist()
    assert sorted(everywhere) == list(range(60 + (12 if validation else 0) + 18))
    names = ("fox / dog / cat", "ant / bee / elk")
    assert made.info.class_names == (
        names if scenario == "domain_incremental" else ("fox", "ant", "dog", "bee", "cat", "elk")
    )
    assert made.info.task_ids == (scenario == "task_incremental")
    assert made.info.classes_per_experience == (2, 2, 2)


def test_an_experience_of_many_classes_is_numbered() -> None:
    assert [e.name for e in stream(groups=[[0, 1, 2, 3], [5, 4]])] == ["experience 1", "fox, elk"]


def test_an_index_names_the_same_text_whatever_the_order_of_classes() -> None:
    by_index = []
    for groups in ([[0, 1], [2, 3], [4, 5]], [[5, 0, 1], [4, 2, 3]]):
        named = {}
        for e in stream(source(), groups):
            for part in (e.train, e.validation, e.test):
                named |= dict(zip(everything(part)["index"].tolist(), said(part), strict=True))
        by_index.append(named)
    assert by_index[0] == by_index[1]


def test_validation_is_stratified_and_depends_on_the_stream_s_seed_only() -> None:
    def held_out(seed: int) -> list[list[str]]:
        torch.rand(1)
        made = stream(source(validation=False, per_class=20), seed=seed)
        for e in made:
            for data, n in ((e.validation, 4), (e.train, 16)):
                assert data is not None
                assert data.labels.bincount(minlength=6)[list(e.classes)].tolist() == [n, n]
        return [said(e.validation) for e in made]

    assert held_out(0) == held_out(0) != held_out(1)


def test_nothing_is_held_out_at_zero_or_from_a_single_text() -> None:
    assert all(e.validation is None for e in stream(source(validation=False), validation_fraction=0))
    made = stream(source(validation=False, per_class=1), validation_fraction=0.5)
    assert all(e.validation is None and len(e.train) == 2 for e in made)


def test_a_validation_file_is_not_split_further() -> None:
    made = stream(source(), validation_fraction=0.5)
    assert [len(e.train) for e in made] == [20, 20, 20]
    assert [len(e.validation) for e in made] == [4, 4, 4]  # type: ignore[arg-type]


def test_experiences_by_title() -> None:
    """Texts that name their experience, though all have the same classes."""
    parts = {}
    for split, n in (("train", 20), ("validation", 4), ("test", 6)):
        rows = [(f"the {'ant' if i % 2 else 'bee'} number {i} of {split}", "ant" if i % 2 else "bee") for i in range(n)]
        where = ["north" if i < n // 2 else "south" for i in range(n)]
        parts[split] = Texts(f"{split}.csv", [t for t, _ in rows], [c for _, c in rows], where)
    given = Source(**parts, class_names=["ant", "bee"])
    plan = number_classes([[0, 1], [0, 1]], ["ant", "bee"], "class_incremental")
    made = text_stream(
        "places", given, plan, "domain_incremental", seed=None, validation_fraction=0.5, max_length=16, vocab_size=300,
        tokenizer=TOKENIZER, titles=["south", "north"], by_title=True,
    )  # fmt: skip
    assert [e.name for e in made] == ["south", "north"]
    for e, numbers in zip(made, (range(10, 20), range(10)), strict=True):
        assert [int(text.split()[3]) for text in said(e.train)] == list(numbers)
        assert e.classes == (0, 1) and e.task_label == 0
        assert (len(e.validation), len(e.test)) == (2, 3)  # type: ignore[arg-type]


# --- tokens


def test_tokens_are_those_of_the_texts() -> None:
    data = stream()[1].train
    batch = everything(data)
    assert torch.equal(batch["input_ids"], encode(TOKENIZER, said(data), 16)["input_ids"])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "task_labels", "index", "source"}


def test_all_experiences_share_the_tokens() -> None:
    made = stream(source(validation=False))
    memory = {p.columns["input_ids"].data_ptr() for e in made for p in (e.train, e.validation)}  # type: ignore[union-attr]
    assert len(memory) == 1


def test_a_tokenizer_is_trained_on_the_first_experience_s_training_texts_alone() -> None:
    made = stream(source(validation=False), tokenizer=None)
    vocabulary = made.tokenizer.get_vocab()
    assert {"fox", "ant", "number", "train"} <= set(vocabulary)
    assert not {"dog", "bee", "cat", "elk", "test"} & set(vocabulary)
    assert made.info.input.vocab_size == len(vocabulary) and made.info.input.pad_token_id == 0
    assert made.notes == [
        f"WordPiece tokenizer with {len(vocabulary)} tokens trained on the first experience's training texts"
    ]
    assert said(made[2].test, made.tokenizer)[0].startswith("the cat number 0")  # though in pieces


def test_held_out_texts_teach_the_tokenizer_no_word() -> None:
    """Each training text has a word of its own."""
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}q" for i in range(60)]
    train = Texts("train.csv", [f"{w} {w}" for w in words], ["ant", "bee"] * 30)
    given = make_source(train, None, texts("test", 1, ["ant"]))
    plan = number_classes([[0, 1]], ["ant", "bee"], "class_incremental")
    made = text_stream(
        "words", given, plan, "class_incremental", seed=0, validation_fraction=0.5, max_length=16, vocab_size=5000,
        tokenizer=None,
    )  # fmt: skip
    vocabulary = set(made.tokenizer.get_vocab())
    trained, held_out = (
        {text.split()[0] for text in said(d, made.tokenizer)} for d in (made[0].train, made[0].validation)
    )
    assert len(trained) == len(held_out) == 30
    assert trained <= vocabulary and not held_out & vocabulary


def test_a_given_tokenizer_is_kept(tmp_path: Any) -> None:
    made = stream()
    assert made.tokenizer is TOKENIZER and made.notes == []
    made.save_assets(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()


# --- notes


def test_texts_that_are_cut_are_counted() -> None:
    given = source()
    long = "the ant number 1 of train and many more words than there is room for"
    given.train.texts[:3], given.test.texts[0] = [long] * 3, long
    made = stream(given, max_length=12)
    assert made[0].train.columns["input_ids"].shape[1] == 12  # type: ignore[attr-defined]
    assert made.notes == [
        "3 of 60 train texts are cut to stream.max_length=12 tokens",
        "1 of 18 test texts are cut to stream.max_length=12 tokens",
    ]


def test_classes_that_the_order_leaves_out_are_counted() -> None:
    made = stream(groups=[[4, 2], [1]])
    assert made.notes == ["stream.class_order leaves out 3 of 6 classes with 45 texts"]
    assert made.info.class_names == ("elk", "cat", "bee")
    assert [len(e.train) for e in made] == [20, 10]


def test_experiences_without_validation_or_test_texts() -> None:
    given = Source(texts("train", 3), texts("validation", 2, CLASSES[:4]), texts("test", 2, CLASSES[2:]), CLASSES)
    made = stream(given, [[0, 1], [2, 3], [4, 5]])
    assert made.notes == [
        "no validation texts in the experiences 3: they are not validated",
        "no test texts in the experiences 1: they have no accuracy",
    ]
    assert made[2].validation is None and made[1].validation is not None
    assert [len(e.test) for e in made] == [0, 4, 4]
