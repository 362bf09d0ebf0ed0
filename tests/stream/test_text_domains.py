"""Streams of domains of text: which text each experience has, and what the tokenizer has seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from clplatform.stream.base import InMemoryStream
from clplatform.stream.text_domains import text_domains
from clplatform.stream.tokenizer import train_wordpiece
from clplatform.types import IGNORED, ClplatformError, Data

REAL = Path(os.environ.get("CLPLATFORM_DATA", "nowhere")).resolve()
real = pytest.mark.skipif(
    not (REAL / "text_domains").is_dir(), reason="CLPLATFORM_DATA names no folder with text_domains"
)
OPTIONS: dict[str, Any] = {
    "name": "mine", "problem": "causal_lm", "data_dir": "texts", "paths": None, "domains": None,
    "scenario": "domain_incremental", "seed": None, "validation_fraction": 0.1, "test_fraction": 0.2, "limit": None,
    "max_length": 16, "tokenizer_kind": "bpe", "tokenizer_vocab_size": 320, "tokenizer_on": "first",
}  # fmt: skip
WORDS = {"sea": "wave salt gull", "inn": "beer bed bread", "sky": "wolke größe é"}


@pytest.fixture(autouse=True)
def _texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLPLATFORM_DATA", raising=False)
    Path("texts").mkdir()
    for name, words in WORDS.items():
        Path(f"texts/{name}.txt").write_text("".join(f"{words} {i}\n" for i in range(200)), encoding="utf-8")


def made(**options: Any) -> InMemoryStream:
    return text_domains(**OPTIONS | options)


def refusal(**options: Any) -> str:
    with pytest.raises(ClplatformError) as caught:
        made(**options)
    return str(caught.value)


def everything(data: Data | None) -> dict[str, Any]:
    assert data is not None
    return data.fetch(torch.arange(len(data)))


def said(stream: InMemoryStream, data: Data | None) -> str:
    """The text of a split of a causal stream."""
    batch = everything(data)
    ids = [int(batch["input_ids"][0, 0]), *batch["labels"][batch["labels"] != IGNORED].tolist()]
    return stream.tokenizer.decode(ids, skip_special_tokens=True)


def names(stream: InMemoryStream) -> list[str]:
    return [e.name for e in stream]


def test_each_experience_has_the_text_of_its_domain() -> None:
    stream = made()
    assert names(stream) == ["inn", "sea", "sky"]
    for e in stream:
        whole = Path(f"texts/{e.name}.txt").read_text()
        assert said(stream, e.train) + said(stream, e.validation) + said(stream, e.test) == whole
        assert e.classes == () and e.n_seen_classes == len(stream.tokenizer) and e.task_label == 0
        for data in (e.train, e.validation, e.test):
            batch = everything(data)
            first = stream.tokenizer.decode(batch["input_ids"][0, :1])
            assert int(batch["n_bytes"].sum()) == len(said(stream, data).encode()) - len(first.encode())
    info = stream.info
    assert (info.problem, info.primary_metric, info.higher_is_better) == ("causal_lm", "perplexity", False)
    assert (info.n_experiences, info.classes_per_experience, info.class_names) == (3, (0, 0, 0), ())
    assert info.input.vocab_size == len(stream.tokenizer) == 320
    assert (info.input.pad_token_id, info.input.bos_token_id, info.input.eos_token_id) == (0, 1, 2)
    assert info.input.mask_token_id is None and not info.task_ids and not stream.augments
    sizes = [len("".join(f"{WORDS['inn']} {i}\n" for i in r).encode()) for r in (range(140), range(140, 200))]
    assert sum(sizes) == len(Path("texts/inn.txt").read_bytes())
    assert stream.notes[0].startswith("bytes of training / validation / test text: inn ")


def test_sample_ids_are_unique_and_texts_may_be_joined() -> None:
    stream = made()
    parts = [d for e in stream for d in (e.train, e.validation, e.test)]
    ids = torch.cat([everything(d)["index"] for d in parts])
    assert sorted(ids.tolist()) == list(range(len(ids)))
    both = stream[0].train + stream[2].train
    assert everything(both)["labels"].shape == (len(stream[0].train) + len(stream[2].train), 16)


def test_task_ids_where_the_domain_is_known() -> None:
    stream = made(scenario="task_incremental")
    assert stream.info.task_ids
    assert [e.task_label for e in stream] == [0, 1, 2]
    assert [set(everything(e.test)["task_labels"].tolist()) for e in stream] == [{0}, {1}, {2}]


def test_the_order_of_the_domains() -> None:
    assert names(made(domains=["sky", "inn"])) == ["sky", "inn"]
    assert names(made(paths=["texts/sky.txt", "inn.txt"])) == ["sky", "inn"]
    orders = {tuple(names(made(seed=seed))) for seed in range(8)}
    assert len(orders) > 2 and all(sorted(order) == sorted(WORDS) for order in orders)
    assert names(made(seed=3)) == names(made(seed=3))
    assert names(made(seed=3, domains=["sky", "sea"])) == ["sky", "sea"]


def test_domains_and_paths_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(domains=["sea", "moon"]) == "stream.domains: there is no 'moon' in mine (there is: inn, sea, sky)"
    assert refusal(domains=["sea", "sea"]) == "stream.domains: 'sea' is there twice"
    assert refusal(domains=[]) == "stream.domains=[]: name one or more; null takes all"
    assert refusal(paths=["moon.txt"]) == "stream.paths: there is no file or folder moon.txt (here or texts)"
    assert refusal(data_dir=None).startswith("the data set text_domains is not here: put a text file, or a folder of")
    monkeypatch.setenv("CLPLATFORM_DATA", ".")
    Path("text_domains").mkdir()
    Path("text_domains/x.txt").write_text("some words\n" * 50)
    assert names(made(data_dir=None)) == ["x"]
    assert names(made(data_dir=None, paths=["text_domains/x.txt", "texts"])) == ["x", "texts"]


def test_a_domain_that_is_too_short() -> None:
    Path("texts/sea.txt").write_text("a")
    assert refusal().startswith("the domain 'sea' has 1 characters, too few lines to hold out 20%")
    Path("texts/sea.txt").write_text("☃\n" * 9, encoding="utf-8")
    message = refusal(problem="masked_lm", tokenizer_kind="wordpiece")
    assert message == "the train text of the domain 'sea' has no token to predict"


# --- the tokenizer


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_tokenizer_never_sees_later_experiences_or_what_is_held_out(kind: str) -> None:
    def trained(**options: Any) -> str:
        stream = made(tokenizer_kind=kind, **options)
        return stream.tokenizer.backend_tokenizer.to_str()

    before, all_before = trained(), trained(tokenizer_on="all")
    lines = Path("texts/inn.txt").read_text().splitlines(keepends=True)
    Path("texts/inn.txt").write_text("".join(lines[:145] + [line.replace("b", "x") for line in lines[145:]]))
    for name in ("sea", "sky"):
        Path(f"texts/{name}.txt").write_text("quite different and new\n" * 100)
    assert trained() == before
    assert trained(tokenizer_on="all") != all_before
    Path("texts/inn.txt").write_text("beef " + "".join(lines))
    assert trained() != before


def test_the_notes_say_what_the_tokenizer_was_trained_on() -> None:
    assert (
        made().notes[-1] == "byte-level BPE tokenizer with 320 tokens trained on the first experience's training text"
    )
    assert made(tokenizer_on="all").notes[-1].endswith("trained on the training text of all experiences")


def test_a_pretrained_backbone_s_tokenizer_takes_precedence() -> None:
    given: Any = train_wordpiece(["wave salt gull beer bed bread"], 200)
    stream = made(tokenizer=given)
    assert stream.tokenizer is given and not any("trained on" in note for note in stream.notes)
    batch = everything(stream[1].train)
    assert given.decode(batch["input_ids"][0, :4]) == "wave salt gull 0"
    assert stream.info.input.eos_token_id == given.sep_token_id
    given.mask_token = None
    assert refusal(tokenizer=given, problem="masked_lm").startswith(
        "stream.problem=masked_lm: the backbone's tokenizer has no mask_token; choose a model that was made for masked_lm"
    )


# --- masked language modelling


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_masked_blocks_have_the_text_and_a_fixed_mask(kind: str) -> None:
    stream = made(problem="masked_lm", tokenizer_kind=kind)
    assert stream.info.primary_metric == "perplexity" and stream.info.input.mask_token_id == 4 and stream.augments
    for e in stream:
        batch = everything(e.train)
        chosen = batch["labels"] != IGNORED
        assert chosen.any(1).all()
        assert torch.equal(batch["original_ids"][chosen], batch["labels"][chosen])
        assert torch.equal(batch["original_ids"][~chosen], batch["input_ids"][~chosen])
        assert (batch["input_ids"] == 4).any()
        if kind == "bpe":
            whole = Path(f"texts/{e.name}.txt").read_text()
            text = stream.tokenizer.decode(batch["original_ids"].flatten(), skip_special_tokens=True)
            assert whole.startswith(text) and len(text) > 0.6 * len(whole)
    again = made(problem="masked_lm", tokenizer_kind=kind)
    assert torch.equal(everything(stream[1].test)["labels"], everything(again[1].test)["labels"])
    batch = everything(stream[0].train)
    drawn = stream.augment(batch, torch.Generator().manual_seed(0))
    assert not torch.equal(drawn["labels"], batch["labels"])
    assert torch.equal(drawn["original_ids"], batch["original_ids"])


# --- the real data


@real
def test_real_domains_with_shakespeare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPLATFORM_DATA", str(REAL))
    paths = [
        "tinyshakespeare",
        *(f"text_domains/genesis_{x}.txt" for x in ("english-kjv", "french", "german")),
        "text_domains/inaugural_1789_1997.txt",
    ]
    stream = made(data_dir=None, paths=paths, limit=60_000, tokenizer_vocab_size=1000, max_length=64)
    assert names(stream)[:2] == ["tinyshakespeare", "genesis_english-kjv"] and len(stream) == 5
    for e, path in zip(stream, [REAL / "tinyshakespeare/input.txt", *(REAL / p for p in paths[1:])], strict=True):
        text = said(stream, e.train) + said(stream, e.validation) + said(stream, e.test)
        assert path.read_text(encoding="utf-8").startswith(text) and 58_000 < len(text) <= 60_000
    assert names(made(data_dir=None, limit=20_000)) == [Path(p).stem for p in paths[1:]]  # SOURCE.txt is no domain


def test_what_the_tokenizer_does_not_know_is_counted(tmp_path: Path) -> None:
    for name, text in (("a", "sea salt and gulls\n" * 200), ("b", "море и соль\n" * 100 + "sea salt\n" * 100)):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "SOURCE.txt").write_text("where it is from")
    notes = made(data_dir=str(tmp_path), problem="masked_lm", tokenizer_kind="wordpiece").notes
    assert not any("of a " in note for note in notes) and any("SOURCE.txt" in note for note in notes)
    (left_out,) = [note for note in notes if note.endswith("knows no token of them")]
    assert (
        left_out.endswith("blocks of b are left out: the tokenizer knows no token of them")
        and int(left_out.split()[0]) > 5
    )
