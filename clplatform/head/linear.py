"""One linear classifier over all classes seen so far; it grows with the stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplatform.types import ExperienceInfo


def grown_linear(old: nn.Linear | None, in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with `out_features` rows of which the first are `old`'s, bit for bit; the new rows are
    initialised as `nn.Linear` does. Device and dtype are kept."""
    if old is None:
        return nn.Linear(in_features, out_features)
    new = nn.Linear(in_features, out_features).to(old.weight)
    with torch.no_grad():
        new.weight[: old.out_features] = old.weight
        new.bias[: old.out_features] = old.bias
    new.requires_grad_(old.weight.requires_grad)
    return new


class LinearHead(nn.Module):
    """Logits over the classes seen so far.

    Args:
        feature_size: D, given by the platform.
    """

    def __init__(self, *, feature_size: int) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.linear: nn.Linear | None = None

    def grow(self, info: ExperienceInfo) -> None:
        """Make room for all classes up to this experience's; idempotent."""
        if self.linear is None or info.n_seen_classes > self.linear.out_features:
            self.linear = grown_linear(self.linear, self.feature_size, info.n_seen_classes)

    def forward(self, features: Tensor, task_labels: Tensor) -> Tensor:
        """features [B, D] → logits [B, K] (of tokens [B, T, D] → [B, T, K]); the task is not looked at."""
        assert self.linear is not None, "grow() comes first"
        return self.linear(features)
