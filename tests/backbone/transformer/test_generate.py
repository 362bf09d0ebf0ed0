"""Greedy search and sampling against Hugging Face, naive implementations and the distribution itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copied import END, PAD, START, VOCABULARY, bart, gpt2, ids, padded
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from clplatform.backbone.transformer.convert import from_bart, from_gpt2
from clplatform.backbone.transformer.generate import distribution, greedy, keep_top_k, keep_top_p, sample
from clplatform.types import ClplatformError

PROMPTS = [[5, 5, 5], [7, 1, 4], [2, 9, 3, 1, 6]]


# -- greedy search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", PROMPTS)
@pytest.mark.parametrize("seed", range(4))
def test_gpt2_writes_what_hugging_face_s_does(seed: int, lengths: list[int]) -> None:
    model = gpt2(seed)
    prompt, mask = padded(lengths, left=True, seed=seed)
    expected = model.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False)
    found = greedy(from_gpt2(model).decoding(prompt, mask), max_new_tokens=20, end=END, pad=PAD)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", PROMPTS)
@pytest.mark.parametrize("seed", range(4))
def test_bart_writes_what_hugging_face_s_does(seed: int, lengths: list[int]) -> None:
    model = bart(seed)
    source, mask = padded(lengths, seed=seed)
    expected = model.generate(source, attention_mask=mask, max_new_tokens=20, do_sample=False, num_beams=1)
    found = greedy(from_bart(model).decoding(source, mask, start=START), max_new_tokens=20, end=END, pad=PAD)
    assert torch.equal(found, expected)


def test_some_of_these_texts_end_and_some_do_not() -> None:
    """Or the comparison above would say little."""
    ended = []
    for seed in range(4):
        prompt, mask = padded([7, 1, 4], left=True, seed=seed)
        out = greedy(from_gpt2(gpt2(seed)).decoding(prompt, mask), max_new_tokens=20, end=END, pad=PAD)[:, 7:]
        ended += (out == END).any(1).tolist()
        for row in out.tolist():
            if END in row:
                assert set(row[row.index(END) + 1 :]) <= {PAD}
    assert 0 < sum(ended) < len(ended)


def test_it_stops_when_all_texts_have_ended() -> None:
    model = from_gpt2(gpt2())
    free = greedy(model.decoding(ids(1, 4)), max_new_tokens=10)
    assert free.shape == (1, 14)
    end = int(free[0, 6])
    first = free[0, 4:].tolist().index(end)
    assert torch.equal(greedy(model.decoding(ids(1, 4)), max_new_tokens=10, end=end), free[:, : 5 + first])


# -- the distribution -------------------------------------------------------------------------------------------------


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 3, 20, 99])
def test_top_k_keeps_the_k_most_likely(k: int) -> None:
    x = logits(50, 20)
    found = keep_top_k(x, k)
    for row, kept in zip(x.tolist(), found.tolist(), strict=True):
        best = sorted(row, reverse=True)[:k]
        assert [v for v in kept if v != -torch.inf] == [v for v in row if v in best]
    assert torch.equal(found, TopKLogitsWarper(k)(None, x))  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_that_suffices(p: float) -> None:
    x = logits(50, 20).double()
    found = keep_top_p(x, p)
    for row, kept in zip(x, found, strict=True):
        probability = row.softmax(0).tolist()
        order = sorted(range(20), key=lambda i: -probability[i])
        nucleus: list[int] = []
        while not nucleus or (sum(probability[i] for i in nucleus) < p and len(nucleus) < 20):
            nucleus.append(order[len(nucleus)])
        assert sorted(nucleus) == (kept > -torch.inf).nonzero()[:, 0].tolist()
        assert torch.equal(kept[nucleus], row[nucleus])
    assert torch.equal(found, TopPLogitsWarper(p)(None, x))  # type: ignore[arg-type]


def test_temperature_first_then_top_k_then_top_p() -> None:
    x = logits(50, 20)
    expected = keep_top_p(keep_top_k(x / 0.8, 3), 0.8).softmax(1)
    assert torch.equal(distribution(x, temperature=0.8, top_k=3, top_p=0.8), expected)
    assert torch.equal(distribution(x), x.softmax(1))
    swapped = keep_top_k(keep_top_p(x / 0.8, 0.8), 3).softmax(1)
    hot = keep_top_p(keep_top_k(x, 3), 0.8).softmax(1)
    assert not torch.equal(expected > 0, swapped > 0) and not torch.equal(expected > 0, hot > 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.9},
    ],
)
def test_tokens_are_drawn_from_it(settings: dict[str, Any]) -> None:
    """χ² of 20 000 draws of a first token, each of its own row, against the probabilities."""
    model, n = from_gpt2(gpt2()), 20_000
    prompt = ids(1, 3)
    p = distribution(model.decoding(prompt).logits(), **settings)[0]
    drawn = sample(
        model.decoding(prompt.expand(n, -1)), max_new_tokens=1, generator=torch.Generator().manual_seed(0), **settings
    )[:, 3]  # fmt: skip
    counts = torch.bincount(drawn, minlength=VOCABULARY)
    assert (counts[p == 0] == 0).all()
    expected = n * p
    usual = expected >= 5
    observed = torch.cat([counts[usual], counts[~usual].sum()[None]]).double()
    expected = torch.cat([expected[usual], expected[~usual].sum()[None]]).double()
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi2, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom > 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # mean and standard deviation of χ²


def test_a_generator_decides_the_tokens_and_the_global_one_is_left_alone() -> None:
    model = from_gpt2(gpt2())
    state = torch.get_rng_state()
    texts = [
        sample(model.decoding(ids(4, 3)), max_new_tokens=10, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_most_likely_token_alone_is_greedy_search() -> None:
    for make in (lambda: from_gpt2(gpt2()).decoding(ids(3, 4)), lambda: from_bart(bart()).decoding(ids(3, 4), start=1)):
        expected = greedy(make(), max_new_tokens=12, end=END, pad=PAD)
        for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
            assert torch.equal(sample(make(), max_new_tokens=12, end=END, pad=PAD, **settings), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: give a number above 0"),
        ({"top_k": 0}, "top_k=0: give 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0: give a number above 0"),
        ({"top_p": 1.1}, "top_p=1.1: give a number above 0, up to 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ClplatformError, match=message):
        sample(from_gpt2(gpt2()).decoding(ids(1, 3)), max_new_tokens=1, **settings)
