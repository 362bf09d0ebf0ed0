"""The head of a language model: none of its own, since a backbone that writes has an output layer, tied to its embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clplatform.types import ExperienceInfo


class VocabularyHead(nn.Module):
    """Stands where other models have a head; it has no parameters, never grows, and is never called: see `answer`."""

    def grow(self, info: ExperienceInfo) -> None:
        """The vocabulary is there from the beginning."""


def answer(backbone: Any, head: Any, features: Tensor, task_labels: Tensor) -> Tensor:
    """The logits [B, K] of a model and its features [B, D]; of a language model [B, T, V] of [B, T, D]."""
    if isinstance(head, VocabularyHead):
        return backbone.projection(features)
    return head(features, task_labels)
