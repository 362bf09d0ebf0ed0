"""Streams of labelled text: CLINC150, Banking77, HWU64, and any CSV, JSONL or Parquet files or Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from clplatform.stream.base import InMemoryStream, Plan, check_one_test, number_classes, plan_classes, resolve_order
from clplatform.stream.labelled_texts import Source, hold_out_test, make_source, text_stream
from clplatform.stream.text_augmentation import Augment
from clplatform.stream.text_files import Texts, banking77_files, clinc150_files, hwu64_files, read_files
from clplatform.stream.text_hub import hub_texts
from clplatform.types import ClplatformError, Scenario

MaxLength = Annotated[int, Ge(4)]
VocabSize = Annotated[int, Ge(100)]
Seed = Annotated[int, Ge(0)] | None
Fraction = Annotated[float, Ge(0), Lt(1)]
TestFraction = Annotated[float, Gt(0), Lt(1)] | None


def clinc150(
    *, name: str, by: Literal["intent", "domain"], scenario: Scenario, n_experiences: Annotated[int, Ge(1)] | None,
    class_order: list[int] | None, seed: Seed, data_dir: str | None, max_length: MaxLength,
    tokenizer_vocab_size: VocabSize, tokenizer: Any = None, augment: Augment = None,
) -> InMemoryStream:  # fmt: skip
    """CLINC150 (Larson et al. 2019): 150 intents of 10 domains, without the out-of-scope queries.

    Args:
        by: `intent`: intents in the order of the training texts (or shuffled by `seed`), 15 experiences of 10 by
            default; `domain`: an experience for each domain (needs `domains.json`), whose order `seed` shuffles.
        augment: random augmentation of training batches, here and below, see `clplatform.stream.text_augmentation`.
        tokenizer: of the pretrained backbone, given by the platform; None: one is trained on the first experience.

    Raises:
        ClplatformError: the files are missing or malformed, or the numbers do not fit.
    """
    splits, names, domains, out_of_scope = clinc150_files(data_dir)
    source = Source(splits["train"], splits["val"], splits["test"], names)
    if out_of_scope:
        source.notes.append(f"{out_of_scope} out-of-scope queries of data_full.json are left out")
    if by == "domain" and not domains:
        raise ClplatformError("stream.by=domain needs domains.json beside data_full.json")
    plan, titles = by_intent_or_domain(by, names, domains, n_experiences, 15, scenario, seed, class_order, "clinc150")
    return text_stream(
        name, source, plan, scenario, seed=seed, validation_fraction=0, max_length=max_length,
        vocab_size=tokenizer_vocab_size, tokenizer=tokenizer, augment=augment, titles=titles,
    )  # fmt: skip


def by_intent_or_domain(
    by: Literal["intent", "domain"], names: list[str], domains: dict[str, list[str]], n_experiences: int | None,
    default: int, scenario: Scenario, seed: int | None, class_order: list[int] | None, what: str,
) -> tuple[Plan, list[str] | None]:  # fmt: skip
    """Intents dealt to experiences, or an experience for each domain; and the names of the experiences, if domains give them.

    Args:
        domains: the intents of each.
        default: experiences by intent.
    """
    if by == "intent":
        n = n_experiences or default
        return plan_classes(names, n, scenario=scenario, seed=seed, class_order=class_order, what=what), None
    if n_experiences not in (None, len(domains)) or class_order is not None:
        raise ClplatformError(
            f"stream.by=domain has one experience for each of the {len(domains)} domains: leave stream.n_experiences and "
            "stream.class_order null"
        )
    titles = [list(domains)[i] for i in resolve_order(len(domains), seed, None, what)]
    number = {n: i for i, n in enumerate(names)}
    return number_classes([[number[c] for c in domains[t]] for t in titles], names, scenario), titles


def hwu64(
    *, name: str, by: Literal["intent", "domain"], scenario: Scenario, n_experiences: Annotated[int, Ge(1)] | None,
    class_order: list[int] | None, seed: Seed, data_dir: str | None, validation_fraction: Fraction,
    max_length: MaxLength, tokenizer_vocab_size: VocabSize, tokenizer: Any = None, augment: Augment = None,
) -> InMemoryStream:  # fmt: skip
    """HWU64 (Liu et al. 2019, "Benchmarking Natural Language Understanding Services for Building Conversational Agents"):
    64 intents of 18 domains, from `train.csv`, `val.csv` and `test.csv` (text, category).

    Args:
        by: `intent`: intents in alphabetical order (or shuffled by `seed`), dealt to `n_experiences`; `domain`: an experience
            for each domain, which is what an intent's name begins with (`alarm_set`), in alphabetical order or shuffled.
    """
    train, validation, test, names = hwu64_files(data_dir)
    domains: dict[str, list[str]] = {}
    for intent in names:
        domains.setdefault(intent.partition("_")[0], []).append(intent)
    plan, titles = by_intent_or_domain(by, names, domains, n_experiences, 8, scenario, seed, class_order, "hwu64")
    return text_stream(
        name, Source(train, validation, test, names), plan, scenario, seed=seed, validation_fraction=validation_fraction,
        max_length=max_length, vocab_size=tokenizer_vocab_size, tokenizer=tokenizer, augment=augment, titles=titles,
    )  # fmt: skip


def banking77(
    *, name: str, scenario: Scenario, n_experiences: int, class_order: list[int] | None, seed: Seed,
    data_dir: str | None, validation_fraction: Fraction, max_length: MaxLength, tokenizer_vocab_size: VocabSize,
    tokenizer: Any = None, augment: Augment = None,
) -> InMemoryStream:  # fmt: skip
    """Banking77 (Casanueva et al. 2020): 77 intents of one domain, from `train.csv` and `test.csv` (text, category)."""
    train, test, names = banking77_files(data_dir)
    plan = plan_classes(names, n_experiences, scenario=scenario, seed=seed, class_order=class_order, what="banking77")
    return text_stream(
        name, Source(train, None, test, names), plan, scenario, seed=seed, validation_fraction=validation_fraction,
        max_length=max_length, vocab_size=tokenizer_vocab_size, tokenizer=tokenizer, augment=augment,
    )  # fmt: skip


def text_files(
    *, name: str, train: str, validation: str | None, test: str | None, text_column: str | list[str], label_column: str,
    experience_column: str | None, scenario: Scenario, n_experiences: int | None, class_order: list[int] | None,
    seed: Seed, validation_fraction: Fraction, max_length: MaxLength, tokenizer_vocab_size: VocabSize,
    tokenizer: Any = None, augment: Augment = None, test_fraction: TestFraction = None,
) -> InMemoryStream:  # fmt: skip
    """Labelled text in CSV, TSV, JSONL or Parquet files.

    Args:
        text_column: one column, or two for pairs of texts.
        experience_column: its values name the experiences, in the order of their first row; None: classes are dealt to
            `n_experiences`.
        test_fraction: of the training texts of each label, which are tested on if there is no test file.
    """
    check_one_test(test, test_fraction)
    columns = [text_column] if isinstance(text_column, str) else text_column
    read: Callable[[str], Texts] = lambda path: read_files(path, columns, label_column, experience_column)  # noqa: E731
    trained = read(train)
    trained, tested = hold_out_test(trained, test_fraction, seed) if test is None else (trained, read(test))
    source = make_source(trained, read(validation) if validation else None, tested)
    return labelled(
        name, source, scenario, n_experiences, class_order, seed, validation_fraction, max_length,
        tokenizer_vocab_size, tokenizer, augment, experience_column is not None,
    )  # fmt: skip


def hf_text(
    *, name: str, dataset: str, subset: str | None, train_split: str, validation_split: str | None, test_split: str,
    text_column: str | list[str], label_column: str, experience_column: str | None, scenario: Scenario,
    n_experiences: int | None, class_order: list[int] | None, seed: Seed, validation_fraction: Fraction,
    max_length: MaxLength, tokenizer_vocab_size: VocabSize, tokenizer: Any = None, augment: Augment = None,
) -> InMemoryStream:  # fmt: skip
    """Labelled text from Hugging Face `datasets`: a name on the hub, or a folder written by `save_to_disk`."""
    columns = [text_column] if isinstance(text_column, str) else text_column
    splits = [train_split, *([validation_split] if validation_split else []), test_split]
    parts = hub_texts(dataset, subset, splits, columns, label_column, experience_column)
    source = make_source(parts[0], parts[1] if validation_split else None, parts[-1])
    return labelled(
        name, source, scenario, n_experiences, class_order, seed, validation_fraction, max_length,
        tokenizer_vocab_size, tokenizer, augment, experience_column is not None,
    )  # fmt: skip


def check_titles(source: Source, labels_of: dict[str, list[str]]) -> None:
    """Refuse validation and test rows of an experience, or of a label in it, that is never trained on."""
    for texts in (source.validation, source.test):
        if texts is None:
            continue
        for i, (title, label) in enumerate(zip(texts.experiences or [], texts.labels, strict=True)):
            if title not in labels_of:
                raise ClplatformError(f"{texts.where(i)}: the experience {title!r} has no training texts")
            if label not in labels_of[title]:
                raise ClplatformError(
                    f"{texts.where(i)}: the label {label!r} is not trained in the experience {title!r}"
                )


def labelled(
    name: str, source: Source, scenario: Scenario, n_experiences: int | None, class_order: list[int] | None,
    seed: int | None, validation_fraction: float, max_length: int, vocab_size: int, tokenizer: Any, augment: Augment,
    by_column: bool,
) -> InMemoryStream:  # fmt: skip
    """Experiences by classes, or by a column of the files."""
    settings: dict[str, Any] = {
        "seed": seed, "validation_fraction": validation_fraction, "max_length": max_length, "vocab_size": vocab_size,
        "tokenizer": tokenizer, "augment": augment,
    }  # fmt: skip
    if not by_column:
        if n_experiences is None:
            raise ClplatformError("stream.n_experiences is missing: say how many, or name a stream.experience_column")
        plan = plan_classes(
            source.class_names, n_experiences, scenario=scenario, seed=seed, class_order=class_order, what=name
        )
        return text_stream(name, source, plan, scenario, **settings)
    labels_of: dict[str, list[str]] = {}
    for title, label in dict.fromkeys(zip(source.train.experiences or [], source.train.labels, strict=True)):
        labels_of.setdefault(title, []).append(label)
    check_titles(source, labels_of)
    if n_experiences not in (None, len(labels_of)) or class_order is not None:
        raise ClplatformError(
            f"stream.experience_column names the {len(labels_of)} experiences and their classes: leave "
            "stream.n_experiences and stream.class_order null"
        )
    titles = [list(labels_of)[i] for i in resolve_order(len(labels_of), seed, None, name)]
    number = {n: i for i, n in enumerate(source.class_names)}
    groups = [[number[label] for label in labels_of[t]] for t in titles]
    # Domains that share labels mean the same by them: each label is a class, not the place within its domain.
    shared = sum(map(len, groups)) > len(number)
    plan = number_classes(groups, source.class_names, "class_incremental" if shared else scenario)
    return text_stream(name, source, plan, scenario, titles=titles, by_title=True, **settings)
