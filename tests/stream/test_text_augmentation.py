"""Deletion and swaps of tokens against what EDA allows, text by text."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import BERT, configuration, text_stream
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor

from clplatform.build import build_stream
from clplatform.config import check, identity
from clplatform.stream.text_augmentation import Augment, delete, swap, text_augmentation
from clplatform.types import Batch, ClplatformError

PAD, UNK, CLS, SEP = 0, 1, 2, 3
TOKENIZER = SimpleNamespace(pad_token_id=PAD, cls_token_id=CLS, sep_token_id=SEP, bos_token_id=None, eos_token_id=None)


def batch_of(*texts: list[int]) -> Batch:
    """Texts between [CLS] and [SEP], and padding. Columns that are not of texts stand beside them."""
    rows = [[CLS, *text, SEP] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(rows))}


def many(length: int, n: int = 400) -> Batch:
    return batch_of(*[list(range(10, 10 + length))] * n)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(batch: Batch, settings: Augment, seed: int = 0) -> Batch:
    augment = text_augmentation(settings, TOKENIZER)
    assert augment is not None
    return augment(batch, generator(seed))


def texts(batch: Batch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def is_part(part: list[int], whole: list[int]) -> bool:
    """Are these of those, in the same order?"""
    rest = iter(whole)
    return all(token in rest for token in part)


@pytest.mark.parametrize("settings", [None, {}, {"deletion": 0.0}, {"deletion": 0, "swap": 0.0}])
def test_nothing_asked_for_is_no_augmentation(settings: Any) -> None:
    assert text_augmentation(settings, TOKENIZER) is None


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_deletion_leaves_each_token_out_with_its_chance_and_moves_the_rest_up(p: float) -> None:
    before = many(20)
    after = augmented(before, {"deletion": p})
    assert after["input_ids"].shape == before["input_ids"].shape
    for ids, mask, old in zip(after["input_ids"], after["attention_mask"], texts(before), strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n)
        assert ids[n:].eq(PAD).all()
        kept = ids[:n].tolist()
        assert kept[0] == CLS and kept[-1] == SEP and is_part(kept, old)
    left = after["attention_mask"].sum() - 2 * len(before["labels"])
    assert left / (20 * len(before["labels"])) == pytest.approx(1 - p, abs=0.02)
    places = Counter(token for text in texts(after) for token in text[1:-1])
    assert min(places.values()) > (1 - p) * 400 * 0.8  # no place is spared or favoured


def test_a_text_never_vanishes_and_each_of_its_tokens_may_be_the_one_that_is_left() -> None:
    after = augmented(many(3), {"deletion": 0.99})
    assert {len(text) for text in texts(after)} <= {3, 4}
    alone = Counter(text[1] for text in texts(after) if len(text) == 3)
    assert set(alone) == {10, 11, 12} and min(alone.values()) > 80
    empty = batch_of([], [10])
    assert texts(augmented(empty, {"deletion": 0.9, "swap": 0.9})) == [[CLS, SEP], [CLS, 10, SEP]]


def test_of_a_pair_each_text_keeps_a_token_and_swaps_stay_within_it() -> None:
    pairs = batch_of(*[[10, 11, 12, SEP, 20, 21, 22]] * 300)
    for text in texts(augmented(pairs, {"deletion": 0.95})):
        first, second = text[1 : text.index(SEP)], text[text.index(SEP) + 1 : -1]
        assert first and second and max(first) < 20 <= min(second)
    swapped = texts(augmented(pairs, {"swap": 0.5}))
    assert all(sorted(t[1:4]) == [10, 11, 12] and sorted(t[5:8]) == [20, 21, 22] for t in swapped)
    assert any(t[1:4] != [10, 11, 12] for t in swapped) and any(t[5:8] != [20, 21, 22] for t in swapped)


@pytest.mark.parametrize(("alpha", "length", "n"), [(0.1, 20, 2), (0.3, 10, 3), (0.1, 3, 1), (0.1, 9, 1)])
def test_so_many_swaps_as_the_formula_says(alpha: float, length: int, n: int) -> None:
    """n transpositions of different places: at most 2 n tokens move, and the permutation has the parity of n."""
    before, after = many(length), augmented(many(length), {"swap": alpha})
    assert torch.equal(after["attention_mask"], before["attention_mask"])
    moved = Counter()
    for old, new in zip(texts(before), texts(after), strict=True):
        assert new[0] == CLS and new[-1] == SEP and sorted(new) == sorted(old)
        order = [token - 10 for token in new[1:-1]]
        inversions = sum(a > b for i, a in enumerate(order) for b in order[i + 1 :])
        assert inversions % 2 == n % 2
        moved[sum(token != i for i, token in enumerate(order))] += 1
    assert max(moved) <= 2 * n
    if n == 1:
        assert set(moved) == {2}


def test_every_pair_of_places_is_swapped_about_as_often() -> None:
    swapped = Counter(tuple(text[1:-1]) for text in texts(augmented(many(4, 1200), {"swap": 0.1})))
    assert len(swapped) == 6 and min(swapped.values()) > 140 and max(swapped.values()) < 260


def test_texts_of_different_lengths_have_swaps_of_their_own_number() -> None:
    long, short = list(range(10, 40)), list(range(50, 58))
    for seed in range(20):
        found = texts(augmented(batch_of(long, short), {"swap": 0.1}, seed))
        assert sum(a != b for a, b in zip(found[1][1:-1], short, strict=True)) == 2
    assert any(
        sum(
            a != b
            for a, b in zip(texts(augmented(batch_of(long, short), {"swap": 0.1}, s))[0][1:-1], long, strict=True)
        )
        == 6
        for s in range(20)
    )


def test_single_tokens_are_not_swapped_and_unknown_words_are_words() -> None:
    assert texts(augmented(batch_of([10]), {"swap": 0.9})) == [[CLS, 10, SEP]]
    assert texts(augmented(batch_of([10, UNK]), {"swap": 0.1})) == [[CLS, UNK, 10, SEP]]
    lengths = {len(text) for text in texts(augmented(batch_of(*[[UNK, UNK]] * 50), {"deletion": 0.5}))}
    assert lengths == {3, 4}


def test_it_depends_on_its_generator_only_and_leaves_the_batch_as_it_was() -> None:
    before = many(12, 8)
    copy = {name: column.clone() for name, column in before.items()}
    torch.manual_seed(1)
    a = augmented(before, {"deletion": 0.2, "swap": 0.2}, seed=3)
    torch.manual_seed(2)
    b = augmented(before, {"deletion": 0.2, "swap": 0.2}, seed=3)
    other = augmented(before, {"deletion": 0.2, "swap": 0.2}, seed=4)
    assert all(torch.equal(a[name], b[name]) for name in before)
    assert not torch.equal(a["input_ids"], other["input_ids"])
    assert all(torch.equal(before[name], copy[name]) for name in before)
    assert a["labels"] is before["labels"]


def test_a_tokenizer_without_frames_augments_whole_texts() -> None:
    """GPT-2's fills up with its end token, which no text has."""
    gpt = SimpleNamespace(pad_token_id=9, cls_token_id=None, sep_token_id=None, bos_token_id=9, eos_token_id=9)
    augment = text_augmentation({"deletion": 0.5}, gpt)
    assert augment is not None
    ids, mask = torch.tensor([[10, 11, 12, 9]] * 200), torch.tensor([[1, 1, 1, 0]] * 200)
    found = texts(augment({"input_ids": ids, "attention_mask": mask}, generator()))
    assert {text[0] for text in found} == {10, 11, 12} and min(map(len, found)) == 1


def test_against_a_loop_over_texts() -> None:
    """The same draws, taken one token at a time."""
    batch = batch_of([10, 11, 12, 13, 14], [20, 21], [30, 31, 32, 33, 34, 35, 36])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    fixed = (ids < 4) | (mask == 0)

    def by_hand(draw: Tensor) -> list[list[int]]:
        found = []
        for row, u in zip(range(len(ids)), draw.tolist(), strict=True):
            words = [t for t in range(ids.shape[1]) if not fixed[row, t]]
            gone = [t for t in words if u[t] < 0.6]
            if gone == words:
                gone.remove(max(words, key=lambda t: u[t]))
            found.append([int(ids[row, t]) for t in range(ids.shape[1]) if mask[row, t] and t not in gone])
        return found

    for seed in range(30):
        new, shorter = delete(ids, mask, fixed, 0.6, PAD, generator(seed))
        draw = torch.rand(ids.shape, generator=generator(seed))
        assert texts({"input_ids": new, "attention_mask": shorter}) == by_hand(draw)
        first, second = torch.rand(1, 2, *ids.shape, generator=generator(seed))[0].tolist()
        for row, found in enumerate(swap(ids, fixed, 0.1, generator(seed)).tolist()):
            words, old = [t for t in range(ids.shape[1]) if not fixed[row, t]], ids[row].tolist()
            a = max(words, key=lambda t: first[row][t])
            b = max((t for t in words if t != a), key=lambda t: second[row][t])
            old[a], old[b] = old[b], old[a]
            assert found == old


def test_a_stream_augments_its_training_batches_and_buffers_keep_what_was_there(tmp_path: Any) -> None:
    stream, replay = TinyTextStream(2), from_page("replay", capacity=64, policy="class_balanced")
    augment = text_augmentation({"deletion": 0.3, "swap": 0.3}, TOKENIZER)
    seen: list[Batch] = []

    def spy(batch: Batch, generator: torch.Generator) -> Batch:
        assert augment is not None
        seen.append(augment(batch, generator))
        return seen[-1]

    make_text_experiment(tmp_path, {"replay": replay}, stream=stream, augment=spy).run()
    known = {
        int(i): ids[: int(m.sum())].tolist()
        for e in stream
        for i, ids, m in zip(*(e.train.fetch(torch.arange(32))[n] for n in ("index", "input_ids", "attention_mask")),
                             strict=True)
    }  # fmt: skip
    stored = replay.buffer.take(torch.arange(len(replay.buffer)))  # type: ignore[attr-defined]
    assert len(stored["labels"]) == 64
    assert all(text == known[int(i)] for i, text in zip(stored["index"], texts(stored), strict=True))
    changed = [t != known[int(i)] for b in seen for i, t in zip(b["index"], texts(b), strict=True)]
    assert 0.5 < sum(changed) / len(changed) <= 1


# -- the setting --------------------------------------------------------------------------------------------------------

BOTH = "stream.augment={deletion:0.1,swap:0.2}"


def test_streams_of_texts_augment_where_their_page_says_so(tmp_path: Any) -> None:
    files = text_stream(tmp_path)
    plain, both = (configuration(*BERT, *files, *more) for more in ((), (BOTH,)))
    for config, augments in ((plain, False), (both, True)):
        check(config)
        stream = build_stream(config)
        assert stream.augments is augments
        batch = stream[0].train.fetch(torch.arange(16))
        changed = stream.augment(batch, generator())["input_ids"]
        assert torch.equal(changed, batch["input_ids"]) is not augments
        test = stream[0].test
        assert torch.equal(test.fetch(torch.arange(4))["input_ids"], test.fetch(torch.arange(4))["input_ids"])


@pytest.mark.parametrize("page", ["clinc150", "banking77", "text_files", "hf_text"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{deletion:1.5}", "less than 1"),
        ("{swap:-0.1}", "greater than or equal to 0"),
        ("{swaps:0.1}", "'deletion' or 'swap'"),
        ("crop", "a group of settings"),
    ],
)
def test_what_is_no_augmentation_is_refused(page: str, wrong: str, message: str) -> None:
    needed = {"hf_text": ["stream.dataset=x"], "text_files": ["stream.train=a.csv", "stream.test=b.csv"]}.get(page, [])
    with pytest.raises(ClplatformError, match=rf"stream\.augment={re.escape(wrong[:1])}.*{message}"):
        check(configuration(*BERT, f"stream={page}", *needed, f"stream.augment={wrong}"))


def test_jobs_without_it_are_those_of_before_there_was_such_a_setting() -> None:
    config = configuration(*BERT, "stream=clinc150")
    before = {**config, "stream": {k: v for k, v in config["stream"].items() if k != "augment"}}
    assert config["stream"]["augment"] is None and "augment" not in before["stream"]
    check(before)  # an earlier run's configuration can still be resumed and loaded
    assert identity(config) == identity(before)
    assert identity(configuration(*BERT, "stream=clinc150", BOTH)) != identity(config)
    images, without = ({**config, "stream": {"augment": a}} for a in ("flip_crop", "none"))
    assert len({identity(images), identity(without), identity({**config, "stream": {}})}) == 3
