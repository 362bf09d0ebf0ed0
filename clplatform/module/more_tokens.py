"""Tokens beside those of a vocabulary, which a model reads and never writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clplatform.module.perturbation import token_embedding


@contextmanager
def more_tokens(backbone: nn.Module, vectors: Tensor) -> Iterator[None]:
    """Inside, the numbers V, V + 1, … stand for these vectors [n, D], where the model embeds its V tokens."""
    embedding: Any = token_embedding(backbone)
    size: int = embedding.num_embeddings
    waiting: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        waiting.append(args[0] - size)
        return (args[0].masked_fill(waiting[-1] >= 0, 0), *args[1:])

    def after(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        number = waiting.pop()
        own = vectors.to(embedded)[number.clamp_min(0)]
        return torch.where((number >= 0)[..., None], own, embedded)

    hooks = [embedding.register_forward_pre_hook(before), embedding.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
