"""Tunings in our own Transformer: prefixes and soft prompts against the model written out, and what fits which of its kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composed import configuration, trained
from encoders import IMAGES, TEXTS, images, texts
from torch import Tensor
from tuned import EXACT, MARKS, NAMES, from_page, shake, trained_names
from writers import SPEC, pairs

from clplatform.backbone.transformer.generate import greedy
from clplatform.build import make
from clplatform.saved import load
from clplatform.types import Batch, ClplatformError

PAGES = {
    "text": "transformer_text", "vit": "transformer_vit", "decoder": "transformer_decoder", "seq2seq": "transformer_seq2seq",
}  # fmt: skip
SIZES = {"size": 16, "n_layers": 2, "n_heads": 2, "inner_size": 24, "dropout": 0.0}
SOFT = ["prompt", "p_tuning"]
FITS = {kind: [n for n in NAMES if kind in ("text", "vit") or n not in SOFT] for kind in PAGES}
LITTLE = ["stream=stdlib_text", "stream.limit=4000", "stream.tokenizer_vocab_size=300", "stream.max_length=32"]


def backbone(kind: str, **changes: Any) -> Any:
    """As its page makes it, but small, in eval mode."""
    node = {k: v for k, v in configuration(f"backbone={PAGES[kind]}")["backbone"].items() if k != "lr"}
    torch.manual_seed(0)
    spec = {"text": TEXTS, "vit": IMAGES}.get(kind, SPEC)
    return make({**node, **SIZES, **changes}, input=spec).eval()


def batch(kind: str) -> Batch:
    return {"text": texts, "decoder": texts, "seq2seq": pairs}[kind]() if kind != "vit" else {"pixel_values": images(5)}


def tuned(kind: str, name: str, **changes: Any) -> Any:
    model = backbone(kind, **changes)
    from_page(name).apply(model, {"text": TEXTS, "vit": IMAGES}.get(kind, SPEC))
    return model


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fitting in FITS.items() for name in fitting])
def test_only_what_is_put_in_is_trained_and_it_reaches_the_features(kind: str, name: str) -> None:
    before, model = backbone(kind)(batch(kind)), tuned(kind, name)
    assert trained_names(model) == {n for n, _ in model.named_parameters() if MARKS[name] in n}
    assert trained_names(model)
    after = model(batch(kind))
    assert after.shape == before.shape
    if name in EXACT:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    shake(model)
    after = model(batch(kind))
    assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4)
    after.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
@pytest.mark.parametrize("name", SOFT)
def test_a_causal_model_takes_prefixes_and_no_prompts(kind: str, name: str) -> None:
    with pytest.raises(
        ClplatformError, match=f"tuning={name} cannot give soft prompts .* is causal; .* or tuning=prefix"
    ):
        tuned(kind, name)


# -- prefixes -----------------------------------------------------------------------------------------------------------


def written_out(attention: Any, x: Tensor, mask: Tensor) -> Tensor:
    """softmax(Q [P_K; K]ᵀ / √d) [P_V; V] of one row [T, D], head by head; mask [T, T]."""
    q, k, v = (getattr(attention, f"{letter}_proj")(x) for letter in "qkv")
    keys, values = (torch.cat([p, own]) for p, own in zip(attention.prefix, (k, v), strict=True))
    seen = torch.cat([torch.ones(len(x), len(attention.prefix[0]), dtype=torch.bool), mask], 1)
    heads = []
    for part in torch.arange(16).split(8):
        scores = (q[:, part] @ keys[:, part].T / 8**0.5).masked_fill(~seen, -torch.inf)
        heads.append(scores.softmax(1) @ values[:, part])
    return attention.out_proj(torch.cat(heads, 1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "decoder"])
def test_every_layer_attends_to_its_prefix(kind: str) -> None:
    model = tuned(kind, "prefix", positions="learned")
    shake(model)
    layers, x = model.blocks()[1:], torch.randn(1, 5, 16)
    for layer in layers:
        causal = kind == "decoder"
        mask = torch.ones(5, 5, dtype=torch.bool)
        expected = written_out(layer.attention, x[0], mask.tril() if causal else mask)
        torch.testing.assert_close(layer.attention(x, causal=causal)[0], expected, rtol=1e-4, atol=1e-5)
    padded = torch.tensor([[1, 1, 1, 0, 0]]).bool()
    found = layers[0].attention(x, mask=padded[:, None, None])[0]
    torch.testing.assert_close(found, written_out(layers[0].attention, x[0], padded.expand(5, 5)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_a_prefix_a_decoder_still_sees_no_future_and_writes_the_same_with_a_cache() -> None:
    model = tuned("decoder", "prefix", positions="rotary")
    shake(model)
    read = texts((6, 6))
    changed = {**read, "input_ids": read["input_ids"].clone()}
    changed["input_ids"][:, 4:] = 9
    assert torch.equal(model(read)[:, :4], model(changed)[:, :4])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for prompts, masked in ((read["input_ids"], None), (read["input_ids"], mask)):
        written = [
            greedy(model.model.decoding(prompts, masked, use_cache=cache), max_new_tokens=5) for cache in (True, False)
        ]
        assert torch.equal(*written)


# -- soft prompts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("name", SOFT)
def test_prompts_stand_behind_the_first_token(name: str, positions: str) -> None:
    """One text at a time, through the layers by hand: a prompt is a token without a position."""
    model = tuned("text", name, positions=positions, pooling="mean")
    shake(model)
    stack, read = model.encoder.stack, texts()
    prompt = stack.soft_prompt() if name == "p_tuning" else stack.soft_prompt
    together = model(read)
    for i, n in enumerate(read["attention_mask"].sum(1).tolist()):
        x, rotation = model.encoder.embeddings(read["input_ids"][i : i + 1, :n])
        x = torch.cat([x[:, :1], prompt[None], x[:, 1:]], 1)
        if rotation is not None:
            angle = torch.atan2(rotation[1], rotation[0])[0, 0]
            angle = torch.cat([angle[:1], torch.zeros(len(prompt), angle.shape[1]), angle[1:]])
            rotation = angle.cos()[None, None], angle.sin()[None, None]
        for layer in stack.layers:
            x = layer(x, None, rotation)
        x = stack.norm(x)
        expected = torch.cat([x[:, :1], x[:, 1 + len(prompt) :]], 1).mean(1)
        torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_class_token_of_an_image_sees_them() -> None:
    model = tuned("vit", "prompt", pooling="cls")
    shake(model)
    x = model.embeddings(model.pixels(images(2)))
    x = torch.cat([x[:, :1], model.stack.soft_prompt.expand(2, -1, -1), x[:, 1:]], 1)
    for layer in model.stack.layers:
        x = layer(x)
    torch.testing.assert_close(model({"pixel_values": images(2)}), model.stack.norm(x)[:, 0], rtol=1e-4, atol=1e-5)


# -- runs ---------------------------------------------------------------------------------------------------------------


def test_a_language_model_with_a_prefix_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    made = trained(
        tmp_path, *LITTLE, "backbone=transformer_decoder", "backbone.size=16", "backbone.inner_size=16",
        "tuning=prefix", "strategy=[replay,lwf]", "optimizer.lr=0.05",
    )  # fmt: skip
    perplexity = made.results.scores["perplexity"]
    assert perplexity[-1][-1] < perplexity[0][-1]
    batch = made.stream[0].test.fetch(torch.arange(3))
    with torch.inference_mode():
        assert torch.equal(load(tmp_path).learner(batch).logits, made.learner(batch).logits)


@pytest.mark.parametrize("name", ["prefix", "prompt", "p_tuning"])
def test_a_saved_vit_answers_as_the_trained_one(name: str, tmp_path: Path) -> None:
    sizes = [f"backbone.{key}={value}" for key, value in SIZES.items()]
    run = trained(
        tmp_path, "backbone=transformer_vit", *sizes, "stream.n_experiences=2", f"tuning={name}", "strategy=ewc"
    )
    samples = run.stream[1].test.fetch(torch.arange(20))
    with torch.inference_mode():
        expected = run.learner(samples).logits
    assert torch.equal(load(tmp_path).logits(samples["pixel_values"].numpy()), expected)
