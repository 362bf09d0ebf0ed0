"""What must not be seen changes nothing, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copied import PAD, bart, bert, gpt2, ids, padded
from torch import Tensor

from clplatform.backbone.transformer.config import LayerConfig
from clplatform.backbone.transformer.convert import from_bart, from_bert, from_gpt2
from clplatform.backbone.transformer.decoder import CausalLM, Decoder
from clplatform.backbone.transformer.embeddings import Embeddings

LENGTHS = [7, 3, 1]


def language_model(positions: Any, norm: Any = "pre") -> CausalLM:
    """One of our own, with lively weights."""
    torch.manual_seed(0)
    config = LayerConfig(size=16, n_heads=2, inner_size=24, norm=norm)
    embeddings = Embeddings(n_tokens=24, size=16, head_size=8, positions=positions, max_length=40)
    model = CausalLM(Decoder(embeddings, config, 2, cross=False)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def others(tokens: Tensor, mask: Tensor) -> Tensor:
    """The same texts with other padding."""
    return torch.where(mask.bool(), tokens, ids(*tokens.shape, seed=9))


@torch.no_grad()
def test_an_encoder_does_not_see_padding() -> None:
    encoder, (tokens, mask) = from_bert(bert()), padded(LENGTHS)
    found, real = encoder(tokens, mask), mask.bool()
    assert torch.equal(found[real], encoder(others(tokens, mask), mask)[real])
    assert not torch.equal(found[real], encoder(others(tokens, mask))[real])  # without the mask it does
    for row, n in enumerate(LENGTHS):
        torch.testing.assert_close(found[row, :n], encoder(tokens[row : row + 1, :n])[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["gpt2", "learned", "sinusoidal", "rotary"])
def test_a_decoder_does_not_see_the_future(positions: str) -> None:
    model = from_gpt2(gpt2()) if positions == "gpt2" else language_model(positions)
    tokens = ids(2, 8)
    for mask in (None, torch.ones_like(tokens)):
        found = model(tokens, mask)
        for t in range(1, 8):
            changed = tokens.clone()
            changed[:, t:] = ids(2, 8 - t, seed=t)
            after = model(changed, mask)
            assert torch.equal(after[:, :t], found[:, :t])
            assert not torch.equal(after[:, t], found[:, t])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["gpt2", "learned", "sinusoidal", "rotary"])
def test_a_decoder_does_not_see_padding_on_the_left(positions: str) -> None:
    model: Any = from_gpt2(gpt2()) if positions == "gpt2" else language_model(positions)
    tokens, mask = padded(LENGTHS, left=True)
    found = model.decoding(tokens, mask).logits()
    assert torch.equal(found, model.decoding(others(tokens, mask), mask).logits())
    for row, n in enumerate(LENGTHS):
        alone = model(tokens[row : row + 1, -n:])[0, -1]
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cross_attention_does_not_see_the_source_s_padding() -> None:
    model, (source, mask), target = from_bart(bart()), padded(LENGTHS), ids(3, 5, seed=4)
    found = model(source, target, mask)
    assert torch.equal(found, model(others(source, mask), target, mask))
    assert not torch.allclose(found, model(others(source, mask), target), atol=1e-3)
    for row, n in enumerate(LENGTHS):
        alone = model(source[row : row + 1, :n], target[row : row + 1])[0]
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_target_s_padding_and_future_are_not_seen() -> None:
    model, source, (target, mask) = from_bart(bart()), ids(3, 6), padded([5, 2, 4])
    found, real = model(source, target, None, mask), mask.bool()
    assert torch.equal(found[real], model(source, others(target, mask), None, mask)[real])
    changed = target.clone()
    changed[:, 3:] = ids(3, 2, seed=5)
    assert torch.equal(model(source, changed, None, mask)[:, :3], found[:, :3])


def gradient(model: Any, module: Any, run: Any) -> Tensor:
    """[B, T]: size of the gradient at every token that goes into `module` (token embeddings)."""
    inside: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, out: inside.append(out))
    out = run()
    handle.remove()
    (found,) = torch.autograd.grad(out.square().sum(), inside[:1])
    return found.abs().amax(-1)


def test_no_gradient_reaches_what_is_not_seen() -> None:
    encoder, (tokens, mask) = from_bert(bert()), padded(LENGTHS)
    real = mask.bool()
    sizes = gradient(encoder, encoder.embeddings.token, lambda: encoder(tokens, mask)[real])
    assert (sizes[~real] == 0).all() and (sizes[real] > 0).all()

    lm = from_gpt2(gpt2())
    sizes = gradient(lm, lm.decoder.embeddings.token, lambda: lm(tokens[:1])[:, 3])
    assert (sizes[0, 4:] == 0).all() and (sizes[0, :4] > 0).all()
    left, left_mask = padded(LENGTHS, left=True)
    sizes = gradient(lm, lm.decoder.embeddings.token, lambda: lm(left, left_mask)[:, -1])
    assert (sizes[~left_mask.bool()] == 0).all() and (sizes[left_mask.bool()] > 0).all()

    model = from_bart(bart())
    sizes = gradient(model, model.encoder.embeddings.token, lambda: model(tokens, ids(3, 4), mask))
    assert (sizes[~real] == 0).all() and (sizes[real] > 0).all()


def test_a_text_of_nothing_but_padding_does_no_harm() -> None:
    encoder, tokens = from_bert(bert()), torch.full((2, 3), PAD)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    out = encoder(tokens, mask)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
