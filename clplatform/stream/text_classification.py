"""AG News, Yelp, DBpedia, Amazon and Yahoo! Answers, one data set after another, in the published orders.

The five data sets of Zhang, Zhao & LeCun 2015 ("Character-level Convolutional Networks for Text Classification") as a stream of
five experiences: de Masson d'Autume et al. 2019, "Episodic Memory in Lifelong Language Learning" (four orders, 115,000 training
and 7,600 test texts of each, the stars of Yelp and Amazon as the same five classes, 33 in all; LAMOL's too), and four of them in
Wang et al. 2023 (O-LoRA, three orders).
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from clplatform.data import derive_seed
from clplatform.stream.base import InMemoryStream, number_classes
from clplatform.stream.image_files import data_folder, missing
from clplatform.stream.labelled_texts import Source, text_stream
from clplatform.stream.tables import no_limit, read_text
from clplatform.stream.text_augmentation import Augment
from clplatform.stream.text_files import Texts
from clplatform.types import ClplatformError, Scenario

STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
# Name → folder as it is published, and the classes by their number in the files, from 1.
DATASETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ag_news": ("ag_news_csv", ("World", "Sports", "Business", "Sci/Tech")),
    "yelp": ("yelp_review_full_csv", STARS),
    "dbpedia": (
        "dbpedia_csv",
        ("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building",
         "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"),
    ),
    "amazon": ("amazon_review_full_csv", STARS),
    "yahoo": (
        "yahoo_answers_csv",
        ("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet", "Sports",
         "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
    ),
}  # fmt: skip
ORDERS: dict[str, tuple[str, ...]] = {
    # de Masson d'Autume et al. 2019, i … iv
    "episodic_1": ("yelp", "ag_news", "dbpedia", "amazon", "yahoo"),
    "episodic_2": ("dbpedia", "yahoo", "ag_news", "amazon", "yelp"),
    "episodic_3": ("yelp", "yahoo", "amazon", "dbpedia", "ag_news"),
    "episodic_4": ("ag_news", "yelp", "amazon", "yahoo", "dbpedia"),
    # Wang et al. 2023, 1 … 3
    "o_lora_1": ("dbpedia", "amazon", "yahoo", "ag_news"),
    "o_lora_2": ("dbpedia", "amazon", "ag_news", "yahoo"),
    "o_lora_3": ("yahoo", "amazon", "ag_news", "dbpedia"),
}
Order = Literal["episodic_1", "episodic_2", "episodic_3", "episodic_4", "o_lora_1", "o_lora_2", "o_lora_3"]
Limit = Annotated[int, Ge(1)] | None


def text_classification(
    *, name: str, order: Order | list[str], scenario: Scenario, merge_reviews: bool, limit: Limit, test_limit: Limit,
    seed: Annotated[int, Ge(0)] | None, data_dir: str | None, validation_fraction: Annotated[float, Ge(0), Lt(1)],
    max_length: Annotated[int, Ge(4)], tokenizer_vocab_size: Annotated[int, Ge(100)], tokenizer: Any = None,
    augment: Augment = None,
) -> InMemoryStream:  # fmt: skip
    """One experience for each data set.

    Args:
        order: a published one, or names of data sets.
        merge_reviews: are the stars of Yelp and Amazon the same classes?
        limit, test_limit: texts of a data set at most, drawn by `seed`; None: all.

    Raises:
        ClplatformError: a file is missing or malformed, or the order names what there is not.
    """
    titles = list(ORDERS[order]) if isinstance(order, str) else order
    if not titles or not set(titles) <= set(DATASETS) or len(set(titles)) < len(titles):
        raise ClplatformError(f"stream.order={titles}: give each of {', '.join(DATASETS)} at most once")
    folder, notes = data_folder("text_classification", data_dir), []
    if folder is None:
        raise missing("text_classification", f"{DATASETS[titles[0]][0]}/train.csv and test.csv, …")
    splits: dict[str, Texts] = {}
    for split, most in (("train", limit), ("test", test_limit)):
        parts = []
        for title in titles:
            path = folder / DATASETS[title][0] / f"{split}.csv"
            rows, n = draw(path, most, derive_seed(seed or 0, title, split))
            parts.append(texts_of(path, title, rows, merge_reviews))
            if len(rows) < n:
                notes.append(f"{title}: {len(rows)} of {n} {split} texts, drawn at random")
        splits[split] = joined(f"{folder}:{split}", parts)
    names = list(dict.fromkeys(label for title in titles for label in classes(title, merge_reviews)))
    number = {n: i for i, n in enumerate(names)}
    groups = [[number[label] for label in classes(title, merge_reviews)] for title in titles]
    # Data sets that share classes mean the same by them: each is a class, not the place within its data set.
    shared = sum(map(len, groups)) > len(names)
    plan = number_classes(groups, names, "class_incremental" if shared else scenario)
    return text_stream(
        name, Source(splits["train"], None, splits["test"], names, notes), plan, scenario, seed=seed,
        validation_fraction=validation_fraction, max_length=max_length, vocab_size=tokenizer_vocab_size,
        tokenizer=tokenizer, augment=augment, titles=titles, by_title=True,
    )  # fmt: skip


def classes(title: str, merge_reviews: bool) -> list[str]:
    """The classes of a data set, by names that tell them from those of others."""
    own = DATASETS[title][1]
    prefix = "reviews" if merge_reviews and own is STARS else title
    return [f"{prefix}: {label}" for label in own]


def draw(path: Path, most: int | None, seed: int) -> tuple[list[tuple[int, list[str]]], int]:
    """Rows of a file with their lines, at most so many and drawn evenly (a reservoir: files of millions of rows are not held);
    and how many there are.

    Raises:
        ClplatformError: the file is missing or malformed, with the line.
    """
    if not path.is_file():
        raise ClplatformError(f"there is no file {path}: the data sets are in folders as they are published")
    chance, kept, n = random.Random(seed), [], 0
    for n, row in enumerate(_rows(path), start=1):
        if most is None or n <= most:
            kept.append(row)
        elif (place := chance.randrange(n)) < most:
            kept[place] = row
    return sorted(kept), n


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    line = 1
    try:
        with no_limit(), path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1
    except csv.Error as error:
        raise ClplatformError(f"{path}:{line}: the row cannot be read ({error})") from None
    except UnicodeDecodeError:
        read_text(path)  # says where
        raise


def texts_of(path: Path, title: str, rows: list[tuple[int, list[str]]], merge_reviews: bool) -> Texts:
    """Rows of a data set: the number of the class, then the text in one or more columns."""
    own = classes(title, merge_reviews)
    texts, labels = [], []
    for line, (label, *columns) in rows:
        if not label.isdecimal() or not 1 <= int(label) <= len(own) or not columns:
            raise ClplatformError(f"{path}:{line}: a row is a class from 1 to {len(own)} and a text, not {label!r}, …")
        # A backslash and an n stand for a newline (in AG News a backslash alone), and some quotes have one before them.
        text = " ".join(columns).replace('\\"', '"')
        texts.append(text.replace("\\" if title == "ag_news" else "\\n", " ").strip())
        labels.append(own[int(label) - 1])
    return Texts(str(path), texts, labels, [title] * len(rows), [line for line, _ in rows])


def joined(path: str, parts: list[Texts]) -> Texts:
    """Texts of several files, one after another."""
    texts, labels, experiences = (
        [x for part in parts for x in getattr(part, name)] for name in ("texts", "labels", "experiences")
    )
    return Texts(path, texts, labels, experiences)
