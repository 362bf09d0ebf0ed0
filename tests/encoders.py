"""Small Hugging Face encoders, made as their pages make them, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplatform.backbone.huggingface import HuggingFaceImage, HuggingFaceText
from clplatform.types import Batch, InputSpec

IMAGES = InputSpec("image", shape=(3, 8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
TEXTS = InputSpec("text", vocab_size=50, pad_token_id=1, max_length=12)

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
# What small models of these types are made from.
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": SIZES,
    "deit": SIZES,
    "beit": SIZES,
    "dinov2_with_registers": {key: value for key, value in SIZES.items() if key != "intermediate_size"},
    "siglip_vision_model": SIZES,
    "swin": {"embed_dim": 8, "depths": [1, 4, 1], "num_heads": [2, 2, 2], "window_size": 2},
    "bert": {**SIZES, "max_position_embeddings": 16},
    "roberta": {**SIZES, "max_position_embeddings": 16},
    "electra": {**SIZES, "max_position_embeddings": 16, "embedding_size": 8},
    "modernbert": {**SIZES, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 2, "cls_token_id": 2,
                   "sep_token_id": 2},
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16, "bos_token_id": 2, "eos_token_id": 2},
}  # fmt: skip

IMAGE_MODELS = ["vit", "deit", "beit", "dinov2_with_registers"]  # with a class token
TEXT_MODELS = ["bert", "roberta", "electra", "modernbert", "distilbert", "gpt2"]


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **CONFIGS[model_type], **changes}


def image_encoder(model_type: str = "vit", *, seed: int = 0, **changes: Any) -> HuggingFaceImage:
    """An image encoder in eval mode; `changes` go to its constructor."""
    settings: dict[str, Any] = {
        "input": IMAGES, "name": "small", "config": config(model_type), "pretrained": None, "package": None,
        "pooling": "cls", "image_size": None, "dropout": None, "attention": "sdpa", "freeze": "none",
    }  # fmt: skip
    torch.manual_seed(seed)
    return HuggingFaceImage(**{**settings, **changes}).eval()


def text_encoder(model_type: str = "bert", *, seed: int = 0, **changes: Any) -> HuggingFaceText:
    """A text encoder in eval mode; `changes` go to its constructor."""
    settings: dict[str, Any] = {
        "input": TEXTS, "name": "small", "config": config(model_type), "pretrained": None, "package": None,
        "pooling": "mean", "dropout": None, "attention": "sdpa", "freeze": "none",
    }  # fmt: skip
    torch.manual_seed(seed)
    return HuggingFaceText(**{**settings, **changes}).eval()


def images(n: int = 5, shape: tuple[int, int, int] = (3, 8, 8)) -> Tensor:
    """uint8 [N, C, H, W]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (n, *shape), generator=generator).to(torch.uint8)


def texts(lengths: tuple[int, ...] = (4, 12, 1, 7)) -> Batch:
    """Texts of so many tokens, padded to the longest."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 50, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
