"""Language models give what Hugging Face's own models give with the same weights; what does not fit is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import config, text_encoder, texts
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from writers import CAUSAL, CONFIGS, ENCODER_DECODERS, SPEC, pairs, writer

from clplatform.types import IGNORED, ClplatformError, InputSpec

MASKED = ["bert", "roberta", "electra", "modernbert", "distilbert"]


def twin(backbone: Any, auto: Any) -> Any:
    """Hugging Face's model of the same configuration and weights."""
    model = auto.from_config(backbone.config, attn_implementation="eager")
    model.load_state_dict(backbone.model.state_dict())
    return model.eval()


@torch.no_grad()
def scatter(backbone: Any, seed: int = 3) -> Any:
    """Weights and output biases that all matter: some start at zero, such as BART's `final_logits_bias`."""
    generator = torch.Generator().manual_seed(seed)
    for p in [*backbone.parameters(), *(b for n, b in backbone.named_buffers() if "logits_bias" in n)]:
        p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return backbone


# -- logits -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", MASKED)
def test_masked_language_models_have_hugging_face_s_logits(model_type: str) -> None:
    backbone = scatter(text_encoder(model_type, problem="masked_lm"))
    features = backbone(texts())
    assert features.shape == (4, 12, 16)
    expected = twin(backbone, AutoModelForMaskedLM)(**texts()).logits
    torch.testing.assert_close(backbone.projection(features), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_language_models_have_hugging_face_s_logits(model_type: str) -> None:
    backbone, batch = scatter(writer(model_type)), texts()
    features = backbone(batch)
    assert features.shape == (4, 12, backbone.feature_size)
    expected = twin(backbone, AutoModelForCausalLM)(**batch).logits
    torch.testing.assert_close(backbone.projection(features), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_encoder_decoders_have_hugging_face_s_logits(model_type: str) -> None:
    backbone, batch = scatter(writer(model_type)), pairs()
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    features = backbone(batch)
    assert features.shape == (4, 6, 16)
    expected = twin(backbone, AutoModelForSeq2SeqLM)(**{n: batch[n] for n in names}).logits
    torch.testing.assert_close(backbone.projection(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "bart", "t5"])
def test_a_copy_projects_with_its_own_weights(model_type: str) -> None:
    """As teachers do."""
    backbone = writer(model_type)
    batch = pairs() if model_type != "gpt2" else texts()
    before = backbone.projection(backbone(batch))
    copied = copy.deepcopy(backbone)
    scatter(backbone)
    assert torch.equal(copied.projection(copied(batch)), before)
    assert not torch.allclose(backbone.projection(backbone(batch)), before, atol=1e-2)


@pytest.mark.parametrize("model_type", [*CAUSAL, *ENCODER_DECODERS])
def test_every_weight_is_in_a_block_or_after_them_and_gets_a_gradient(model_type: str) -> None:
    backbone = writer(model_type).train()
    batch = texts() if model_type in CAUSAL else pairs()
    backbone.projection(backbone(batch)).square().mean().backward()
    # Marian's positions are sinusoids.
    without = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    blocks = backbone.blocks()
    assert len(blocks) == (4 if model_type in CAUSAL else 1 + 2 + 2)
    assert sum(p.numel() for p in blocks[0].parameters()) >= 50 * 8


@torch.no_grad()
@pytest.mark.parametrize("model_type", CAUSAL)
def test_padding_on_the_right_changes_nothing(model_type: str) -> None:
    backbone, batch = writer(model_type), texts()
    together = backbone(batch)
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = backbone({name: column[i : i + 1, :n] for name, column in batch.items()})
        torch.testing.assert_close(together[i : i + 1, :n], alone, rtol=1e-4, atol=1e-5)


# -- writing ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(backbone: Any, source: dict[str, torch.Tensor]) -> list[int]:
    """The most likely token again and again, by whole passes."""
    row = [SPEC.bos_token_id]
    while (len(row) <= SPEC.max_target_length and row[-1] != SPEC.eos_token_id) or len(row) == 1:
        logits = backbone.projection(backbone({**source, "decoder_input_ids": torch.tensor([row])}))
        row.append(int(logits[0, -1].argmax()))
    return row[1:]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_an_encoder_decoder_writes_the_most_likely_tokens(model_type: str) -> None:
    backbone, batch = scatter(writer(model_type)), pairs()
    written = backbone.generate(batch)
    assert written.shape[1] <= SPEC.max_target_length
    ends = 0
    for i in range(4):
        n = int(batch["attention_mask"][i].sum())
        expected = by_hand(backbone, {x: batch[x][i : i + 1, :n] for x in ("input_ids", "attention_mask")})
        assert written[i].tolist()[: len(expected)] == expected
        assert set(written[i].tolist()[len(expected) :]) <= {SPEC.pad_token_id}
        ends += expected[-1] == SPEC.eos_token_id
    beams = scatter(writer(model_type, beams=3)).generate(batch)
    assert beams.shape[0] == 4 and beams.shape[1] <= SPEC.max_target_length


@torch.no_grad()
@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_causal_model_goes_on_with_prompts_of_different_lengths(model_type: str) -> None:
    backbone = scatter(writer(model_type))
    prompts = [[5, 6, 7, 8], [9, 10]]
    ids = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = backbone.generate({"input_ids": ids, "attention_mask": mask})
    assert found.shape == (2, 6)  # half of a text of 12
    for prompt, row in zip(prompts, found.tolist(), strict=True):
        text = list(prompt)
        for token in row:
            one = torch.tensor([text])
            logits = backbone.projection(backbone({"input_ids": one, "attention_mask": torch.ones_like(one)}))
            assert int(logits[0, -1].argmax()) == token
            text.append(token)
            if token == SPEC.eos_token_id:
                break


# -- pretrained ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bart", "t5"])
def test_pretrained_weights_and_a_saved_model(model_type: str, tmp_path: Path) -> None:
    folder, saved = tmp_path / "pretrained", tmp_path / "saved"
    batch = texts() if model_type in CAUSAL else pairs()
    original = scatter(writer(model_type))
    original.model.save_pretrained(folder)
    loaded = writer(model_type, seed=4, config=None, pretrained=str(folder))
    assert loaded.source == str(folder)
    assert torch.equal(loaded.projection(loaded(batch)), original.projection(original(batch)))
    loaded.save_assets(saved)
    shutil.rmtree(folder)
    again = writer(model_type, seed=5, config=None, pretrained=str(folder), load_weights=False, assets=saved)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.projection(again(batch)), loaded.projection(loaded(batch)))


@torch.no_grad()
def test_what_a_pretrained_model_must_not_write_it_does_not_write(tmp_path: Path) -> None:
    """Marian's padding token begins its targets and must not be written; its settings say so, also once it is saved."""
    original = scatter(writer("marian"))
    plain = original.generate(pairs())
    never = [int(plain[0, 0])]
    original.model.generation_config.bad_words_ids = [never]
    original.model.generation_config.num_beams = 7  # taste: the page's has the say
    original.model.save_pretrained(tmp_path / "a")
    loaded = writer("marian", config=None, pretrained=str(tmp_path / "a"))
    loaded.save_assets(tmp_path / "b")
    again = writer("marian", config=None, pretrained="x/y", load_weights=False, assets=tmp_path / "b")
    again.load_state_dict(loaded.state_dict())
    for backbone in (loaded, again):
        assert not (backbone.generate(pairs()) == never[0]).any()
    assert (plain == never[0]).any()


@torch.no_grad()
def test_weights_without_an_output_layer_get_a_new_one_with_a_note(tmp_path: Path) -> None:
    bare = text_encoder("bert", seed=3)
    bare.model.save_pretrained(tmp_path)
    backbone = text_encoder("bert", config=None, pretrained=str(tmp_path), problem="masked_lm")
    torch.testing.assert_close(backbone(texts()).mean(), twin_hidden(bare).mean(), rtol=1e-4, atol=1e-6)
    assert "cls.predictions.transform.dense.weight" in backbone.notes[0] and len(backbone.notes) == 1
    whole = text_encoder("bert", problem="masked_lm")
    whole.model.save_pretrained(tmp_path / "whole")
    assert not text_encoder("bert", config=None, pretrained=str(tmp_path / "whole"), problem="masked_lm").notes


def twin_hidden(encoder: Any) -> torch.Tensor:
    return encoder.model(**texts()).last_hidden_state


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "kind", "changes", "message"),
    [
        ("bart", "gpt2", {}, "bart is no causal language model"),
        ("gpt2", "bart", {}, "gpt2 is no encoder-decoder that writes"),
        ("vit", "gpt2", {}, "vit is no causal language model"),
        ("bert", "gpt2", {}, "BertLMHeadModel sees the tokens that it is to predict; choose a decoder, such as gpt2"),
        ("gpt2", "gpt2", {"max_length": 17}, "stream.max_length=17: backbone=small takes at most 16 tokens"),
        ("bart", "bart", {"max_target_length": 20}, "stream.max_target_length=20: .* at most 16 tokens"),
    ],
)
def test_what_does_not_fit(model_type: str, kind: str, changes: dict[str, Any], message: str) -> None:

    values = {"model_type": model_type, **CONFIGS.get(model_type, config("bert") if model_type == "bert" else {})}
    spec = InputSpec(**{**SPEC.to_dict(), **changes})
    with pytest.raises(ClplatformError, match=message):
        writer(kind, config=values, input=spec)


def test_an_encoder_without_an_output_layer_is_no_masked_language_model() -> None:
    with pytest.raises(ClplatformError, match="gpt2 is no masked language model"):
        text_encoder("gpt2", problem="masked_lm")


# -- losses the way Hugging Face has them ---------------------------------------------------------------------------------


def test_a_causal_loss_is_hugging_face_s() -> None:
    """It shifts labels itself; ours stand where they are predicted."""
    backbone = scatter(writer("gpt2"))
    ids = texts((12, 12))["input_ids"]
    theirs = backbone.model(input_ids=ids, labels=ids).loss
    logits = backbone.projection(backbone({"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}))
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), theirs)
    assert IGNORED == -100  # as theirs
