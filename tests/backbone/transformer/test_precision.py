"""Half precision, autocast and training: everything runs, and near the numbers of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copied import END, PAD, START, bart, bert, gpt2, ids, padded

from clplatform.backbone.transformer.beam import beam_search
from clplatform.backbone.transformer.config import LayerConfig
from clplatform.backbone.transformer.convert import from_bart, from_bert, from_gpt2
from clplatform.backbone.transformer.decoder import CausalLM, Decoder
from clplatform.backbone.transformer.embeddings import Embeddings
from clplatform.backbone.transformer.generate import greedy, sample


def run(name: str, model: Any) -> torch.Tensor:
    tokens, mask = padded([6, 2, 4])
    if name == "bert":
        return model(tokens, mask)[mask.bool()]
    return model(tokens, ids(3, 5), mask) if name == "bart" else model(tokens, mask)[mask.bool()]


MODELS = {"bert": lambda: from_bert(bert()), "gpt2": lambda: from_gpt2(gpt2()), "bart": lambda: from_bart(bart())}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_near_float32(name: str) -> None:
    model = MODELS[name]()
    expected = run(name, model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(name, model)
    half = run(name, model.bfloat16())
    assert half.dtype == torch.bfloat16
    for found in (mixed, half):
        assert 0 < float((found.float() - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_autocast(name: str) -> None:
    model = MODELS[name]().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = run(name, model)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for n, p in model.named_parameters())  # fmt: skip


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_decoding(positions: Any, way: str) -> None:
    torch.manual_seed(0)
    embeddings = Embeddings(n_tokens=24, size=16, head_size=8, positions=positions, max_length=40)
    config = LayerConfig(size=16, n_heads=2, inner_size=24)
    model: Any = CausalLM(Decoder(embeddings, config, 2, cross=False)).eval()
    if way == "bfloat16":
        model = model.bfloat16()
    prompt, mask = padded([5, 2], left=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        logits = model.decoding(prompt, mask).logits()
        assert logits.dtype == torch.float32 and logits.isfinite().all()
        assert greedy(model.decoding(prompt, mask), max_new_tokens=6).shape == (2, 11)
        assert sample(model.decoding(prompt, mask), max_new_tokens=6, top_p=0.9).shape == (2, 11)
        beams = beam_search(model.decoding(prompt, mask), n_beams=3, max_new_tokens=6)
    assert beams.ids_BKT.shape == (2, 3, 11) and beams.scores_BK.isfinite().all()


def test_an_encoder_decoder_decodes_in_bfloat16() -> None:
    model, (source, mask) = from_bart(bart()).bfloat16(), padded([5, 2])
    found = beam_search(model.decoding(source, mask, start=START), n_beams=3, max_new_tokens=6, end=END, pad=PAD)
    assert found.scores_BK.isfinite().all()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_language_model_learns(norm: Any) -> None:
    """Sequences that count up: after training they are continued without a mistake."""
    torch.manual_seed(0)
    embeddings = Embeddings(n_tokens=12, size=32, head_size=8, positions="rotary", max_length=0)
    model = CausalLM(Decoder(embeddings, LayerConfig(size=32, n_heads=4, inner_size=64, norm=norm), 2, cross=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    tokens = (torch.arange(12)[:, None] + torch.arange(8)) % 12
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    found = greedy(model.decoding(tokens[:, :3]), max_new_tokens=5)
    assert torch.equal(found, tokens)
