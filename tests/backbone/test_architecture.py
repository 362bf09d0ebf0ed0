"""Which Hugging Face models can be a backbone, and that every setting of theirs is used or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import CONFIGS, IMAGES, TEXT_MODELS, TEXTS, config, image_encoder, text_encoder, texts

from clplatform.types import ClplatformError

# -- settings -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_dropout_sets_every_probability(model_type: str) -> None:
    off = text_encoder(model_type, dropout=0.0).train()
    assert torch.equal(off(texts()), off(texts()))
    assert torch.equal(off(texts()), text_encoder(model_type)(texts()))
    on = text_encoder(model_type, dropout=0.3)
    set_to = {key: value for key, value in on.config.to_dict().items() if "drop" in key and isinstance(value, float)}
    assert len(set_to) >= 2
    assert set(set_to.values()) == {0.3}
    assert not torch.equal(on.train()(texts()), on(texts()))


@pytest.mark.parametrize("model_type", sorted(set(CONFIGS) - {"swin"}))
def test_blocks_are_the_embeddings_and_the_layers(model_type: str) -> None:
    is_text = model_type in TEXT_MODELS
    encoder = text_encoder(model_type) if is_text else image_encoder(model_type, pooling="mean")
    embeddings, *layers = encoder.blocks()
    assert len(layers) == 3
    assert len({type(layer) for layer in layers}) == 1
    # What is not in a block comes after the layers.
    rest = {n.rpartition(".")[0] for n, _ in encoder.model.named_parameters()}
    named = {m: n for n, m in encoder.model.named_modules()}
    inside = {named[m] for part in (embeddings, *layers) for m in part.modules() if m in named}
    after = {"layernorm", "post_layernorm", "norm", "ln_f", "final_norm", "head", "pooler"}
    assert {n.split(".")[0] for n in rest - inside} <= after
    assert {n for n in rest if "embed" in n or n in ("wte", "wpe")} <= inside


def test_blocks_of_nested_lists_are_the_outer_ones() -> None:
    """Swin's stages, not the layers of its longest stage."""
    encoder = image_encoder("swin", config=config("swin", patch_size=1), pooling="mean")
    assert [type(block).__name__ for block in encoder.blocks()[1:]] == ["SwinStage"] * 3


def test_random_weights_are_the_seed_s() -> None:
    a, b, c = (text_encoder(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(
        a["model.encoder.layer.0.output.dense.weight"], c["model.encoder.layer.0.output.dense.weight"]
    )


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "give backbone.pretrained, or backbone.config with a model_type"),
        ({"config": {"model_type": "brt"}}, "model_type=brt: Hugging Face has no such model; did you mean bert"),
        (
            {"config": config("bert", hiden_size=8)},
            "hiden_size: BertConfig has no such setting; did you mean hidden_size",
        ),
        ({"config": config("bert", hidden_size="wide")}, "not a configuration .*expected int, got str"),
        ({"config": config("bert", num_attention_heads=3)}, "not a multiple of the number of attention heads"),
        ({"config": config("vit")}, "backbone=small: vit is no model that reads text"),
        ({"config": {"model_type": "t5"}}, "t5 is no Transformer encoder"),
        ({"attention": "quick"}, "the model cannot be built .*; choose another backbone.attention, such as eager"),
        ({"config": config("distilbert"), "pooling": "pooler"}, "DistilBertModel has no pooler; choose"),
        ({"input": IMAGES}, "small reads texts, but the stream is made of images; choose backbone=vit_tiny"),
    ],
)
def test_a_text_model_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClplatformError, match=message):
        text_encoder(**changes)


def test_an_architecture_without_fast_attention_says_what_to_choose() -> None:
    settings = {"model_type": "mpnet", **CONFIGS["bert"]}
    with pytest.raises(ClplatformError, match=r"backbone\.attention, such as eager"):
        text_encoder(config=settings)
    assert text_encoder(config=settings, attention="eager")(texts()).shape == (4, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": config("bert")}, "bert is no model that reads images"),
        ({"config": {"model_type": "resnet"}}, "resnet is no Transformer encoder with one size of features"),
        (
            {"config": config("siglip_vision_model")},
            "SiglipVisionModel has no class token; choose backbone.pooling=mean",
        ),
        ({"config": config("vit", patch_size=16)}, "a patch of 16 pixels is larger than the image"),
        ({"input": TEXTS}, "small reads images, but the stream is made of texts; choose backbone=bert_tiny"),
    ],
)
def test_an_image_model_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClplatformError, match=message):
        image_encoder(**changes)
