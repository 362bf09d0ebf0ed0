"""AG News, Yelp, DBpedia, Amazon and Yahoo! Answers from files as they are published."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import configuration

from clplatform.build import build_stream
from clplatform.stream.text_classification import DATASETS, ORDERS, draw, text_classification
from clplatform.types import ClplatformError

OPTIONS: dict[str, Any] = {
    "name": "text_classification", "order": "episodic_1", "scenario": "class_incremental", "merge_reviews": True,
    "limit": None, "test_limit": None, "seed": None, "validation_fraction": 0.0, "max_length": 32, "tokenizer_vocab_size": 500,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every data set with three training texts of each class and one test text."""
    for title, (place, labels) in DATASETS.items():
        (tmp_path / place).mkdir()
        for split, n in (("train", 3), ("test", 1)):
            rows = [
                [
                    str(k + 1),
                    *(["a title"] if title != "yelp" else []),
                    f'{title} {split} {k} {i} says \\"yes\\"' + ("\\next" if title == "ag_news" else "\\nthen"),
                ]
                for i in range(n)
                for k in range(len(labels))
            ]
            with (tmp_path / place / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    return tmp_path


def make(folder: Path, **options: Any) -> Any:
    return text_classification(**{**OPTIONS, "data_dir": str(folder), **options})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        make(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
def test_an_experience_is_a_data_set(order: str, folder: Path) -> None:
    stream = make(folder, order=order)
    assert [e.name for e in stream] == list(ORDERS[order])
    for e in stream:
        k = len(DATASETS[e.name][1])
        batch = e.train.fetch(torch.arange(len(e.train)))
        assert len(e.train) == 3 * k and len(e.test) == k == len(e.classes)
        assert set(batch["labels"].tolist()) == set(e.classes)
        text = stream.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
        assert e.name.replace("_", " _ ") in text or e.name in text
        assert text.endswith(' " yes " next' if e.name == "ag_news" else ' " yes " then')
        assert ("a title" in text) == (e.name != "yelp")


def test_yelp_and_amazon_share_their_stars_if_they_are_to(folder: Path) -> None:
    merged, apart = make(folder), make(folder, merge_reviews=False)
    assert len(merged.info.class_names) == 33 and len(apart.info.class_names) == 38
    of = {e.name: e.classes for e in merged}
    assert of["yelp"] == of["amazon"] == (0, 1, 2, 3, 4)
    assert merged.info.class_names[0] == "reviews: 1 star" and apart.info.class_names[0] == "yelp: 1 star"
    assert not {e.name: set(e.classes) for e in apart}["amazon"] & set(range(5))
    assert {"ag_news: Sports", "yahoo: Sports"} < set(merged.info.class_names)  # not the same


def test_own_orders_and_task_ids(folder: Path) -> None:
    stream = make(folder, order=["yahoo", "yelp"], scenario="task_incremental")
    assert [e.name for e in stream] == ["yahoo", "yelp"] and [e.task_label for e in stream] == [0, 1]
    for order in ([], ["yelp", "yelp"], ["imdb"]):
        assert refusal(folder, order=order).endswith("give each of ag_news, yelp, dbpedia, amazon, yahoo at most once")


def test_texts_are_drawn_by_the_seed_and_the_report_says_so(folder: Path) -> None:
    a, b, c = (make(folder, limit=6, test_limit=4, seed=seed) for seed in (1, 1, 2))
    assert [len(e.train) for e in a] == [6] * 5 and [len(e.test) for e in a] == [4] * 5
    texts = [s[0].train.fetch(torch.arange(6))["labels"].tolist() for s in (a, b, c)]
    assert texts[0] == texts[1] != texts[2]
    assert "dbpedia: 6 of 42 train texts, drawn at random" in a.notes
    assert not any("drawn" in note for note in make(folder).notes)


def test_the_draw_is_even(tmp_path: Path) -> None:
    """Each of 12 rows is among 3 as often as another: χ² with 11 degrees of freedom, 99.9 % below 31.3."""
    path = tmp_path / "train.csv"
    path.write_text("".join(f'"1","{i}"\n' for i in range(12)))
    counts: Counter[int] = Counter()
    for seed in range(2000):
        rows, n = draw(path, 3, seed)
        assert n == 12 and len({line for line, _ in rows}) == 3
        counts.update(int(text) for _, (_, text) in rows)
    assert sum((counts[i] - 500) ** 2 / 500 for i in range(12)) < 31.3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"5","title","text"', ":2: a row is a class from 1 to 4 and a text, not '5', …"),
        ('"World","title","text"', ":2: a row is a class from 1 to 4 and a text, not 'World', …"),
        ('"²","title","text"', ":2: a row is a class from 1 to 4 and a text, not '²', …"),
        ('"1"', ":2: a row is a class from 1 to 4 and a text, not '1', …"),
        ('"1",""', ":2: the text is empty"),
        ('"1","a"b', ":2: the row cannot be read ("),
    ],
)
def test_bad_rows_are_refused_with_their_line(row: str, message: str, folder: Path) -> None:
    path = folder / "ag_news_csv" / "train.csv"
    path.write_text(f'"1","a","b"\n{row}\n')
    assert refusal(folder).startswith(f"{path}{message}")


def test_what_is_not_there_or_not_utf_8(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "dbpedia_csv" / "train.csv"
    path.write_bytes(b'"1","a","b"\n"2","caf\xe9","b"\n')
    assert refusal(folder).startswith(f"{path}:2: not UTF-8")
    path.unlink()
    assert refusal(folder) == f"there is no file {path}: the data sets are in folders as they are published"
    monkeypatch.delenv("CLPLATFORM_DATA", raising=False)
    assert "put yelp_review_full_csv/train.csv and test.csv" in refusal(folder, data_dir=None)


def test_the_page(folder: Path) -> None:
    """As published, but for the number of texts."""
    config = configuration("stream=text_classification", f"stream.data_dir={folder}", "backbone=transformer_text")
    assert (config["stream"]["limit"], config["stream"]["test_limit"]) == (115_000, 7_600)
    assert [e.name for e in build_stream(config, None)] == list(ORDERS["episodic_1"])
