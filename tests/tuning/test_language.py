"""Tunings on language models: what is trained, that it changes what is written, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import TEXTS, text_encoder, texts
from tuned import EXACT, MARKS, NAMES, from_page, shake, trained_names
from writers import SPEC, pairs, writer

from clplatform.metric.flops import measure
from clplatform.types import ClplatformError

# What fits, for each kind of model; T5 has no biases, GPT-2 its keys and values in one layer with its queries.
FITS = {
    "bert": NAMES,
    "gpt2": ["adapter", "bitfit", "dora", "lora"],
    "llama": ["adapter", "dora", "ia3", "lora"],
    "bart": ["adapter", "bitfit", "dora", "ia3", "lora"],
    "t5": ["adapter", "dora", "ia3", "lora"],
}
REFUSED = [(kind, name) for kind, fitting in FITS.items() for name in NAMES if name not in fitting]


def model(kind: str) -> tuple[Any, Any, Any]:
    """A language model, a batch for it, and what it is told of samples."""
    if kind == "bert":
        return text_encoder("bert", problem="masked_lm"), texts(), TEXTS
    return writer(kind), pairs() if kind in ("bart", "t5") else texts(), spec(kind)


def spec(kind: str) -> Any:
    from dataclasses import replace

    return SPEC if kind in ("bart", "t5") else replace(SPEC, max_target_length=None)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fitting in FITS.items() for name in fitting])
def test_only_what_is_put_in_is_trained_and_it_reaches_the_logits(kind: str, name: str) -> None:
    backbone, batch, of_samples = model(kind)
    before = backbone.projection(backbone(batch))
    torch.manual_seed(5)
    from_page(name).apply(backbone, of_samples)
    assert trained_names(backbone) == {n for n, _ in backbone.named_parameters() if MARKS[name] in n}
    assert trained_names(backbone)
    after = backbone.projection(backbone(batch))
    assert after.shape == before.shape
    if name in EXACT:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    after.square().mean().backward()
    if name not in ("lora", "dora"):  # whose A gets none while B is zero
        without = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
    shake(backbone)
    assert not torch.allclose(backbone.projection(backbone(batch)), before, rtol=1e-4, atol=1e-5)
    assert measure(backbone, (8,), True) > measure(backbone, (8,), False) > 0
    if kind != "bert":
        written = backbone.eval().generate({n: batch[n][:, :6] for n in ("input_ids", "attention_mask")})
        assert written.shape[0] == 4


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_what_does_not_fit_says_so(kind: str, name: str) -> None:
    backbone, _, of_samples = model(kind)
    message = {
        "prompt": "tuning=prompt cannot give soft prompts to this backbone: its attention is causal; choose an encoder",
        "p_tuning": "tuning=p_tuning cannot give soft prompts to this backbone: its attention is causal; choose an encoder",
        "prefix": "tuning=prefix cannot give prefixes to this backbone: its attention is causal; choose an encoder",
        "bitfit": "tuning=bitfit: the backbone has no biases; choose another tuning, such as lora",
        "ia3": "tuning=ia3 finds no keys and values in GPT2Model: choose another backbone",
    }[name]
    with pytest.raises(ClplatformError, match=message):
        from_page(name).apply(backbone, of_samples)


@pytest.mark.parametrize(("kind", "n"), [("gpt2", 3), ("llama", 6), ("bart", 12), ("t5", 12)])
def test_adapted_layers_are_those_of_attention_and_never_the_output_layer(kind: str, n: int) -> None:
    backbone, _, of_samples = model(kind)
    from_page("lora").apply(backbone, of_samples)
    adapted = {name.rpartition(".lora_A")[0] for name in trained_names(backbone) if "lora_A" in name}
    assert len(adapted) == n
    everywhere, _, of_samples = model(kind)
    from_page("lora", targets="all").apply(everywhere, of_samples)
    names = {name.rpartition(".lora_A")[0] for name in trained_names(everywhere) if "lora_A" in name}
    assert names > adapted and not any("lm_head" in name for name in names)


def test_a_new_output_layer_is_trained_whatever_the_tuning(tmp_path: Any) -> None:
    text_encoder("bert").model.save_pretrained(tmp_path)
    backbone = text_encoder("bert", config=None, pretrained=str(tmp_path), problem="masked_lm")
    from_page("lora").apply(backbone, TEXTS)
    rest = {n for n in trained_names(backbone) if "lora_" not in n}
    assert rest and all(n.startswith("model.cls.predictions.") for n in rest)
