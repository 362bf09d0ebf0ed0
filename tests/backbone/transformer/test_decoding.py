"""Decoding with the cache and without it, all at once and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copied import END, PAD, START, VOCABULARY, bart, gpt2, ids, padded
from torch import Tensor

from clplatform.backbone.transformer.beam import beam_search
from clplatform.backbone.transformer.cache import Cache
from clplatform.backbone.transformer.config import LayerConfig
from clplatform.backbone.transformer.convert import from_bart, from_gpt2
from clplatform.backbone.transformer.decoder import CausalLM, Decoder
from clplatform.backbone.transformer.decoding import Decoding
from clplatform.backbone.transformer.embeddings import Embeddings
from clplatform.backbone.transformer.encoder import Encoder
from clplatform.backbone.transformer.encoder_decoder import EncoderDecoder
from clplatform.backbone.transformer.generate import greedy, sample
from clplatform.types import ClplatformError

MODELS = ["gpt2", "bart", "learned", "sinusoidal", "rotary", "rotary encoder-decoder"]


def model(name: str) -> Any:
    if name == "gpt2":
        return from_gpt2(gpt2())
    if name == "bart":
        return from_bart(bart())
    torch.manual_seed(0)
    config = LayerConfig(size=16, n_heads=2, inner_size=24)

    def embeddings() -> Embeddings:
        positions: Any = name.split()[0]
        return Embeddings(n_tokens=VOCABULARY, size=16, head_size=8, positions=positions, max_length=40)

    if "encoder" in name:
        decoder = Decoder(embeddings(), config, 2, cross=True)
        made: Any = EncoderDecoder(Encoder(embeddings(), config, 2), decoder)
    else:
        made = CausalLM(Decoder(embeddings(), config, 2, cross=False))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.eval()


def begin(made: Any, *, use_cache: bool, lengths: list[int] | None = None) -> Decoding:
    """Three texts, of different lengths unless the model's are all given."""
    if isinstance(made, EncoderDecoder):
        source, mask = padded(lengths or [6, 2, 4])
        return made.decoding(source, mask, start=START, use_cache=use_cache)
    if lengths == []:
        return made.decoding(ids(3, 5), use_cache=use_cache)
    prompt, mask = padded(lengths or [6, 2, 4], left=True)
    return made.decoding(prompt, mask, use_cache=use_cache)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[], None])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_all_tokens_at_once(name: str, lengths: list[int] | None) -> None:
    made = model(name)
    cached, uncached = (begin(made, use_cache=c, lengths=lengths) for c in (True, False))
    for step in range(8):
        found, expected = cached.logits(), uncached.logits()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert cached.cache is not None and uncached.cache is None
        assert cached.cache.length == cached.ids_BT.shape[1]
        tokens = ids(3, seed=step)
        cached.append(tokens)
        uncached.append(tokens)
    if not isinstance(made, EncoderDecoder) and lengths == []:
        torch.testing.assert_close(uncached.logits(), made(uncached.ids_BT)[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_same(name: str, way: str) -> None:
    made, found = model(name), []
    for use_cache in (True, False):
        decoding = begin(made, use_cache=use_cache)
        options: dict[str, Any] = {"max_new_tokens": 12, "end": END, "pad": PAD}
        if way == "greedy":
            found.append(greedy(decoding, **options))
        elif way == "sample":
            found.append(sample(decoding, generator=torch.Generator().manual_seed(1), top_p=0.9, **options))
        else:
            found.append(beam_search(decoding, n_beams=4, **options).ids_BKT)
    assert torch.equal(*found)
    assert found[0].shape[-1] > 8


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(3, 2, 1), (1, 5), (2, 2, 2)])
@pytest.mark.parametrize("name", ["gpt2", "rotary", "bart"])
def test_several_tokens_may_be_added_at_once(name: str, sizes: tuple[int, ...]) -> None:
    made, tokens = model(name), ids(2, sum(sizes))
    inputs = {"memory_BMD": made.encoder(ids(2, 4, seed=3))} if name == "bart" else {}
    expected = made.decoder(tokens, **inputs)
    for mask in (None, torch.ones_like(tokens)):
        cache, found, end = Cache(len(made.decoder.layers)), [], 0
        for size in sizes:
            end += size
            new_mask = None if mask is None else mask[:, :end]
            found.append(made.decoder(tokens[:, end - size : end], mask_BS=new_mask, cache=cache, **inputs))
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)
        assert cache.length == sum(sizes)


@torch.no_grad()
def test_the_encoder_s_keys_are_computed_once() -> None:
    made, calls = model("bart"), []
    made.decoder.layers[0].cross_attention.k_proj.register_forward_hook(lambda *_: calls.append(1))
    made.encoder.register_forward_hook(lambda *_: calls.append(10))
    greedy(begin(made, use_cache=True), max_new_tokens=5)
    assert sum(calls) == 11


@torch.no_grad()
def test_a_new_token_costs_one_token_s_work() -> None:
    made, lengths = model("gpt2"), []
    made.decoder.layers[0].feed_forward.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    greedy(made.decoding(ids(2, 5)), max_new_tokens=4)
    assert lengths == [5, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_rows_are_repeated_and_reordered(name: str) -> None:
    made = model(name)
    decoding = begin(made, use_cache=True)
    decoding.logits()
    decoding.repeat(2)
    tokens = ids(6, seed=2)
    decoding.append(tokens)
    decoding.logits()
    rows = torch.tensor([1, 1, 3, 2, 4, 4])
    decoding.reorder(rows)
    decoding.append(ids(6, seed=3))
    fresh = begin(made, use_cache=False)
    fresh.repeat(2)
    fresh.append(tokens[rows])
    fresh.append(ids(6, seed=3))
    assert torch.equal(decoding.ids_BT, fresh.ids_BT)
    found: Tensor = decoding.logits()
    torch.testing.assert_close(found, fresh.logits(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[2])


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    made = model("gpt2")
    right, mask = padded([4, 2])
    with pytest.raises(ClplatformError, match="pad shorter prompts on the left"):
        made.decoding(right, mask)
    with pytest.raises(ClplatformError, match="every prompt must end in a token"):
        made.decoding(right[:, :0])
    with pytest.raises(ClplatformError, match="41 tokens: the model has positions for 40"):
        greedy(made.decoding(ids(1, 30)), max_new_tokens=12)
    assert greedy(made.decoding(ids(1, 30)), max_new_tokens=11).shape == (1, 41)  # the last is not read
    prompt, mask = padded([10, 30], left=True)
    assert greedy(made.decoding(prompt[:1], mask[:1]), max_new_tokens=31).shape == (1, 61)  # padding has no position
