"""Streams that go on: a stream cut in two and put together again is the same stream, for every problem; what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import configuration
from small_streams import STREAMS
from torch import Tensor

from clplatform import build
from clplatform.stream.base import InMemoryStream
from clplatform.stream.extend import extend
from clplatform.stream.images import split_images
from clplatform.types import ClplatformError, Data


def digits(scenario: str = "class_incremental", **changes: Any) -> InMemoryStream:
    options: dict[str, Any] = {
        "name": "digits", "dataset": "digits", "scenario": scenario, "n_experiences": 3, "class_order": [0, 1, 2, 3, 4, 5],
        "seed": None, "data_dir": None, "validation_fraction": 0.1, "augment": "none",
    }  # fmt: skip
    return split_images(**options | changes)


def everything(data: Data | None) -> dict[str, Tensor]:
    return {} if data is None else data.fetch(torch.arange(len(data)))


def alike(ours: InMemoryStream, theirs: InMemoryStream) -> None:
    """The same samples in the same experiences, with the same labels; ids tell samples apart."""
    assert ours.info == theirs.info
    ids: list[int] = []
    for a, b in zip(ours, theirs, strict=True):
        assert a.info == b.info
        for split in ("train", "validation", "test"):
            x, y = (everything(getattr(e, split)) for e in (a, b))
            assert x.keys() == y.keys()
            ids += x["index"].tolist() if x else []
            for name in x.keys() - {"index", "question"}:
                assert torch.equal(x[name], y[name]), (a.index, split, name)
            if ours.texts:
                read = [[s.texts[i] for i in z["index"].tolist()] for s, z in ((ours, x), (theirs, y))]
                assert read[0] == read[1]
            if len(ours.offsets):
                n = x["input_ids"].shape[1]
                assert torch.equal(ours.offsets[x["index"], :n], theirs.offsets[y["index"], :n])
                questions, others = (torch.unique(z["question"], return_inverse=True)[1] for z in (x, y))
                assert torch.equal(questions, others)
    assert len(set(ids)) == len(ids)


def cut(stream: InMemoryStream, at: int) -> tuple[InMemoryStream, InMemoryStream]:
    """The first `at` experiences and the others, each a stream that knows its own classes only."""
    info, parts = stream.info, []
    for part in (stream.experiences[:at], stream.experiences[at:]):
        known = list(dict.fromkeys(c for e in part for c in e.classes))
        number = torch.zeros(1 + max(known, default=0), dtype=torch.int64)
        number[known] = torch.arange(len(known))
        moved = []
        for place, e in enumerate(part):
            task = place if info.task_ids else 0
            splits = {}
            for split in ("train", "validation", "test"):
                columns = everything(getattr(e, split))
                if info.has_classes and columns:
                    labels = columns["labels"]
                    columns["labels"] = torch.where(labels < 0, labels, number[labels.clamp_min(0)])
                columns.pop("source", None)
                columns |= {"task_labels": torch.full_like(columns["task_labels"], task)} if columns else {}
                splits[split] = None if not columns else type(e.train)(columns)
            classes = tuple(sorted(number[list(e.classes)].tolist()))
            seen = 1 + max(known.index(c) for p in part[: place + 1] for c in p.classes) if known else e.n_seen_classes
            moved.append(replace(e, index=place, task_label=task, classes=classes, n_seen_classes=seen, **splits))
        names = tuple(info.class_names[c] for c in known)
        short = replace(
            info, class_names=names, n_experiences=len(part), classes_per_experience=tuple(len(e.classes) for e in part)
        )
        parts.append(replace(stream, info=short, experiences=moved))
    return parts[0], parts[1]


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
def test_images_cut_in_two_and_put_together_again(scenario: str) -> None:
    stream = digits(scenario)
    first, second = cut(stream, 1)
    assert first.info.class_names == ("0", "1") and second.info.class_names == ("2", "3", "4", "5")
    second = replace(second, experiences=[replace(e, name=f"x{e.index}") for e in second])
    whole = extend(first, second)
    assert [e.name for e in whole] == ["0 1", "digits: x0", "digits: x1"]
    alike(replace(whole, experiences=[replace(a, name=b.name) for a, b in zip(whole, stream, strict=True)]), stream)


@pytest.mark.parametrize("kind", STREAMS)
def test_texts_of_every_problem_cut_in_two_and_put_together_again(kind: str, tmp_path: Path) -> None:
    config = configuration(*STREAMS[kind](tmp_path / "data"))
    stream: Any = build.build_stream(config, None)
    assert len(stream) == 2
    whole = extend(*cut(stream, 1))
    # Both parts carry all texts, as the whole does twice then: ids of the second point behind those of the first.
    assert whole.experiences[1].name == stream.info.name
    alike(replace(whole, experiences=[replace(a, name=b.name) for a, b in zip(whole, stream, strict=True)]), stream)


def test_a_class_that_is_known_by_its_name_keeps_its_number() -> None:
    stream = digits()
    again = extend(stream, digits(n_experiences=2, class_order=[5, 9, 0, 8]))
    assert again.info.class_names == ("0", "1", "2", "3", "4", "5", "9", "8")
    assert [e.classes for e in again] == [(0, 1), (2, 3), (4, 5), (5, 6), (0, 7)]
    assert [e.n_seen_classes for e in again] == [2, 4, 6, 7, 8]
    assert again.info.classes_per_experience == (2,) * 5
    for e in again:
        assert set(e.train.labels.tolist()) == set(e.test.labels.tolist()) == set(e.classes)
    ids = [i for e in again for d in (e.train, e.validation, e.test) for i in everything(d)["index"].tolist()]
    assert len(set(ids)) == len(ids)
    five = again[3].test.labels == 5
    pixels, original = everything(again[3].test)["pixel_values"][five], everything(stream[2].test)
    assert torch.equal(pixels, original["pixel_values"][original["labels"] == 5])


def test_new_data_are_a_new_task_where_earlier_ones_have_come_back() -> None:
    stream = digits("task_incremental")
    back = replace(stream, experiences=[replace(e, task_label=e.index % 2) for e in stream])
    longer = extend(back, digits(n_experiences=2, class_order=[6, 7, 8, 9]))
    assert [e.task_label for e in longer] == [0, 1, 0, 2, 3]
    assert longer[3].test.fetch(torch.arange(3))["task_labels"].tolist() == [2, 2, 2]
    assert [e.task_label for e in extend(digits(), digits())] == [0] * 6


def test_domains_have_the_same_classes() -> None:
    stream = digits("domain_incremental")
    with pytest.raises(ClplatformError, match=r"the class '0'.*domain_incremental.*'0 / 2 / 4', '1 / 3 / 5'"):
        extend(stream, digits())
    named = replace(stream, info=replace(stream.info, class_names=("even", "odd")))
    other = digits(n_experiences=1, class_order=[6, 7])
    other = replace(other, info=replace(other.info, class_names=("odd", "even")))  # in another order
    longer = extend(named, other)
    assert longer.info.class_names == ("even", "odd")
    assert longer[3].classes == (0, 1) and longer[3].n_seen_classes == 2
    assert torch.equal(longer[3].test.labels, 1 - other[0].test.labels)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    stream = digits()
    texts: Any = build.build_stream(configuration(*STREAMS["text"](tmp_path / "a")), None)
    pairs: Any = build.build_stream(configuration(*STREAMS["pairs"](tmp_path / "b")), None)
    with pytest.raises(ClplatformError, match="new data are problem seq2seq, and the run's are classification"):
        extend(texts, pairs)
    small = replace(stream.info, input=replace(stream.info.input, shape=(3, 4, 8)))
    with pytest.raises(
        ClplatformError, match="new images are 4×8 with 3 channels, and the run's are 8×8 with 1 channel$"
    ):
        extend(stream, replace(stream, info=small))


def test_names_and_augmentation_and_notes() -> None:
    stream = replace(digits(augment="crop"), notes=["one"])
    more = replace(digits(n_experiences=1, class_order=[6, 7]), notes=["two"])
    longer = extend(extend(stream, more), more)
    assert [e.name for e in longer][3:] == ["digits", "digits (2)"]
    assert extend(longer, more)[5].name == "digits (3)"
    assert longer.augmentation is more.augmentation is None
    assert extend(more, stream).augmentation is stream.augmentation is not None
    assert longer.notes == ["one", "two", "two"]


def test_places_of_tokens_are_padded_to_the_longest() -> None:
    stream, more = digits(), digits(n_experiences=1, class_order=[6, 7])
    for ours, theirs in ((3, 5), (5, 3)):
        a, b = torch.randint(9, (4, ours, 2)), torch.randint(9, (2, theirs, 2))
        found = extend(replace(stream, offsets=a), replace(more, offsets=b)).offsets
        assert found.shape == (6, 5, 2)
        assert torch.equal(found[:4, :ours], a) and torch.equal(found[4:, :theirs], b)
        assert not found[:4, ours:].any() and not found[4:, theirs:].any()
