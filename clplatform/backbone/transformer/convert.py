"""Weights of Hugging Face's BERT, GPT-2 and BART, copied into the same architectures made of our parts.

    D  model size

Each function takes a model in memory and leaves it as it is; the result gives the same numbers. What our parts do not
have is refused, not ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clplatform.backbone.transformer.config import LayerConfig
from clplatform.backbone.transformer.decoder import CausalLM, Decoder
from clplatform.backbone.transformer.embeddings import Embeddings
from clplatform.backbone.transformer.encoder import Encoder
from clplatform.backbone.transformer.encoder_decoder import EncoderDecoder
from clplatform.types import ClplatformError

if TYPE_CHECKING:
    from transformers import BartForConditionalGeneration, BertModel, GPT2LMHeadModel

# Hugging Face's names of our activations
ACTIVATION: dict[str, Any] = {
    "gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "relu": "relu",
}  # fmt: skip


def from_bert(model: BertModel) -> Encoder:
    """BERT (Devlin et al. 2019): post-norm, learned positions, two segments; without its pooler.

    Raises:
        ClplatformError: it is configured as something that our parts do not have.
    """
    c: Any = model.config
    _require("BERT", is_decoder=(c.is_decoder, False))
    config = LayerConfig(
        size=c.hidden_size, n_heads=c.num_attention_heads, inner_size=c.intermediate_size,
        activation=_activation(c.hidden_act), norm="post", dropout=c.hidden_dropout_prob,
        attention_dropout=c.attention_probs_dropout_prob, epsilon=c.layer_norm_eps,
    )  # fmt: skip
    embeddings = Embeddings(
        n_tokens=c.vocab_size, size=c.hidden_size, head_size=config.head_size, positions="learned",
        max_length=c.max_position_embeddings, n_segments=c.type_vocab_size, norm=c.layer_norm_eps,
        dropout=c.hidden_dropout_prob,
    )  # fmt: skip
    encoder = Encoder(embeddings, config, c.num_hidden_layers)
    names = {
        "embeddings.token": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.segment": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
    }
    for i in range(c.num_hidden_layers):
        ours, theirs = f"stack.layers.{i}", f"encoder.layer.{i}"
        names |= {
            f"{ours}.attention.q_proj": f"{theirs}.attention.self.query",
            f"{ours}.attention.k_proj": f"{theirs}.attention.self.key",
            f"{ours}.attention.v_proj": f"{theirs}.attention.self.value",
            f"{ours}.attention.out_proj": f"{theirs}.attention.output.dense",
            f"{ours}.attention_residual.norm": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.feed_forward.expand": f"{theirs}.intermediate.dense",
            f"{ours}.feed_forward.contract": f"{theirs}.output.dense",
            f"{ours}.feed_forward_residual.norm": f"{theirs}.output.LayerNorm",
        }
    return _load(encoder, model, _rename(names, model.state_dict()))


def from_gpt2(model: GPT2LMHeadModel) -> CausalLM:
    """GPT-2 (Radford et al. 2019): pre-norm, learned positions, tied embeddings.

    Raises:
        ClplatformError: it is configured as something that our parts do not have.
    """
    c: Any = model.config
    _require(
        "GPT-2", scale_attn_weights=(c.scale_attn_weights, True), add_cross_attention=(c.add_cross_attention, False),
        scale_attn_by_inverse_layer_idx=(c.scale_attn_by_inverse_layer_idx, False),
    )  # fmt: skip
    config = LayerConfig(
        size=c.n_embd, n_heads=c.n_head, inner_size=c.n_inner or 4 * c.n_embd, norm="pre",
        activation=_activation(c.activation_function), dropout=c.resid_pdrop, attention_dropout=c.attn_pdrop,
        epsilon=c.layer_norm_epsilon,
    )  # fmt: skip
    embeddings = Embeddings(
        n_tokens=c.vocab_size, size=c.n_embd, head_size=config.head_size, positions="learned",
        max_length=c.n_positions, dropout=c.embd_pdrop,
    )  # fmt: skip
    ours = CausalLM(Decoder(embeddings, config, c.n_layer, cross=False), tied=c.tie_word_embeddings)
    theirs = model.state_dict()
    for i in range(c.n_layer):  # its matrices are [in, out], and queries, keys and values are one
        layer = f"transformer.h.{i}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            theirs[f"{layer}.{name}.weight"] = theirs[f"{layer}.{name}.weight"].T
        for kind in ("weight", "bias"):
            parts = theirs[f"{layer}.attn.c_attn.{kind}"].chunk(3)
            theirs |= {f"{layer}.attn.{p}.{kind}": part for p, part in zip("qkv", parts, strict=True)}
    names = {
        "decoder.embeddings.token": "transformer.wte", "decoder.embeddings.position": "transformer.wpe",
        "decoder.norm": "transformer.ln_f", "head": "lm_head",
    }  # fmt: skip
    for i in range(c.n_layer):
        layer, block = f"decoder.layers.{i}", f"transformer.h.{i}"
        names |= {f"{layer}.attention.{p}_proj": f"{block}.attn.{p}" for p in "qkv"}
        names |= {
            f"{layer}.attention.out_proj": f"{block}.attn.c_proj",
            f"{layer}.attention_residual.norm": f"{block}.ln_1",
            f"{layer}.feed_forward.expand": f"{block}.mlp.c_fc",
            f"{layer}.feed_forward.contract": f"{block}.mlp.c_proj",
            f"{layer}.feed_forward_residual.norm": f"{block}.ln_2",
        }
    return _load(ours, model, _rename(names, theirs))


def from_bart(model: BartForConditionalGeneration) -> EncoderDecoder:
    """BART (Lewis et al. 2020): post-norm, learned positions that begin at the third row of the table, tied embeddings.

    Raises:
        ClplatformError: it is configured as something that our parts do not have.
    """
    c: Any = model.config
    _require("BART", encoder_layerdrop=(c.encoder_layerdrop, 0), decoder_layerdrop=(c.decoder_layerdrop, 0))

    def parts(n_heads: int, inner_size: int) -> tuple[Embeddings, LayerConfig]:
        config = LayerConfig(
            size=c.d_model, n_heads=n_heads, inner_size=inner_size, activation=_activation(c.activation_function),
            norm="post", dropout=c.dropout, attention_dropout=c.attention_dropout,
            activation_dropout=c.activation_dropout,
        )  # fmt: skip
        embeddings = Embeddings(
            n_tokens=c.vocab_size, size=c.d_model, head_size=config.head_size, positions="learned",
            max_length=c.max_position_embeddings, scale=math.sqrt(c.d_model) if c.scale_embedding else 1.0, norm=1e-5,
            dropout=c.dropout,
        )  # fmt: skip
        return embeddings, config

    encoder = Encoder(*parts(c.encoder_attention_heads, c.encoder_ffn_dim), c.encoder_layers)
    decoder = Decoder(*parts(c.decoder_attention_heads, c.decoder_ffn_dim), c.decoder_layers, cross=True)
    ours = EncoderDecoder(encoder, decoder, tied=c.tie_word_embeddings, bias=True)
    theirs = model.state_dict()
    theirs["lm_head.bias"] = theirs["final_logits_bias"][0]
    names = {"head": "lm_head"}
    for side, layers, n in (("encoder", "stack.layers", c.encoder_layers), ("decoder", "layers", c.decoder_layers)):
        table = f"model.{side}.embed_positions.weight"
        theirs[table] = theirs[table][2:]
        names |= {
            f"{side}.embeddings.token": f"model.{side}.embed_tokens",
            f"{side}.embeddings.position": f"model.{side}.embed_positions",
            f"{side}.embeddings.norm": f"model.{side}.layernorm_embedding",
        }
        for i in range(n):
            names |= _bart_layer(f"{side}.{layers}.{i}", f"model.{side}.layers.{i}", cross=side == "decoder")
    return _load(ours, model, _rename(names, theirs))


def _bart_layer(ours: str, theirs: str, *, cross: bool) -> dict[str, str]:
    """Our names of a layer's modules → BART's."""
    names = {
        f"{ours}.attention_residual.norm": f"{theirs}.self_attn_layer_norm",
        f"{ours}.feed_forward.expand": f"{theirs}.fc1",
        f"{ours}.feed_forward.contract": f"{theirs}.fc2",
        f"{ours}.feed_forward_residual.norm": f"{theirs}.final_layer_norm",
    }
    if cross:
        names[f"{ours}.cross_attention_residual.norm"] = f"{theirs}.encoder_attn_layer_norm"
    for attention, name in (("attention", "self_attn"), ("cross_attention", "encoder_attn"))[: 1 + cross]:
        names |= {f"{ours}.{attention}.{p}": f"{theirs}.{name}.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
    return names


# -- what they share --------------------------------------------------------------------------------------------------


def _activation(name: Any) -> Any:
    if name not in ACTIVATION:
        raise ClplatformError(f"activation {name}: our feed-forward networks have {', '.join(ACTIVATION)}")
    return ACTIVATION[name]


def _require(what: str, **settings: tuple[Any, Any]) -> None:
    """Refuse what is configured otherwise: name = (value, value that our parts have)."""
    for name, (value, needed) in settings.items():
        if value != needed:
            raise ClplatformError(f"{what} with {name}={value} cannot be converted: only {needed} can")


def _rename(names: dict[str, str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights and biases of these modules, by our names."""
    return {
        f"{ours}.{kind}": weights[f"{theirs}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in weights
    }


def _load(ours: Any, theirs: nn.Module, weights: dict[str, Tensor]) -> Any:
    """Our model with a copy of all these weights, of the same type, on the same device and in the same mode."""
    first = next(theirs.parameters())
    ours.to(first.device, first.dtype)
    with torch.no_grad():
        ours.load_state_dict(weights)
    return ours.train(theirs.training)
