"""Small Hugging Face language models, made as their pages make them, and pairs of texts for them."""

from __future__ import annotations

from typing import Any

import torch
from encoders import texts

from clplatform.backbone.huggingface_language import HuggingFaceCausal, HuggingFaceSeq2Seq
from clplatform.types import Batch, InputSpec

SPEC = InputSpec(
    "text", vocab_size=50, pad_token_id=0, max_length=12, bos_token_id=1, eos_token_id=2, max_target_length=8
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16},
    "llama": {**SIZES, "intermediate_size": 24},
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 16},
    "gpt_neox": {**SIZES, "intermediate_size": 24},
    "gemma2": {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5},
    "granite": {**SIZES, "intermediate_size": 24, "logits_scaling": 3.0},
    "bart": BART,
    "marian": BART,
    "mbart": BART,
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
}  # fmt: skip
CAUSAL = ["gpt2", "llama", "opt", "gpt_neox", "gemma2", "granite"]
ENCODER_DECODERS = ["bart", "t5", "marian", "mbart"]


def writer(model_type: str = "gpt2", *, seed: int = 0, **changes: Any) -> Any:
    """A language model in eval mode; `changes` go to its constructor."""
    made: Any = HuggingFaceCausal if model_type in CAUSAL else HuggingFaceSeq2Seq
    settings: dict[str, Any] = {
        "input": SPEC, "name": "small", "config": {"model_type": model_type, **CONFIGS[model_type]}, "pretrained": None,
        "package": None, "dropout": None, "attention": "eager" if model_type == "gemma2" else "sdpa", "beams": 1, "length_penalty": 1.0, "freeze": "none",
    }  # fmt: skip
    torch.manual_seed(seed)
    return made(**{**settings, **changes}).eval()


def pairs() -> Batch:
    """Four texts, and what is written so far for each."""
    generator = torch.Generator().manual_seed(4)
    written = torch.randint(3, 50, (4, 6), generator=generator)
    return {**texts(), "decoder_input_ids": written, "decoder_attention_mask": torch.ones_like(written)}
