"""Small Hugging Face models with random weights, whose copies the tests of our Transformer compare with; and texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

VOCABULARY, START, END, PAD = 24, 1, 2, 3
POSITIONS = 40


def bert(seed: int = 0, **changes: Any) -> BertModel:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 24, "max_position_embeddings": POSITIONS, "initializer_range": 0.3, "pad_token_id": PAD,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomised(BertModel(BertConfig(**settings | changes)))


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": POSITIONS,
        "initializer_range": 0.4, "bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomised(GPT2LMHeadModel(GPT2Config(**settings | changes)))


def bart(seed: int = 0, **changes: Any) -> BartForConditionalGeneration:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20,
        "max_position_embeddings": POSITIONS, "init_std": 0.4, "pad_token_id": PAD, "bos_token_id": 0,
        "eos_token_id": END, "decoder_start_token_id": START, "forced_eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = randomised(BartForConditionalGeneration(BartConfig(**settings | changes)))
    model.generation_config.forced_eos_token_id = None
    model.final_logits_bias.normal_(std=0.5)
    return model


def randomised(model: Any) -> Any:
    """Biases and normalisations that are not 0 and 1, in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens that are neither the end nor padding."""
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], *, left: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random texts of these lengths, and their mask."""
    place = torch.arange(max(lengths))
    mask = (place < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return torch.where(mask.bool(), ids(*mask.shape, seed=seed), PAD), mask
