"""Cosine classifier (LUCIR, Hou et al. 2019, Eq. 4): logit_k = η · cos(θ_k, f(x)), with η learned.

Without norms and biases, classes learned last are not favoured by the size of their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.head.linear import grown_linear
from clplatform.types import ExperienceInfo


class CosineHead(nn.Module):
    """Cosine of features and class weights, scaled.

    Args:
        feature_size: D, given by the platform.
        scale: initial η.
    """

    def __init__(self, *, feature_size: int, scale: float) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.weight = nn.Parameter(torch.zeros(0, feature_size))

    def grow(self, info: ExperienceInfo) -> None:
        """Make room for all classes up to this experience's; idempotent."""
        n_old = len(self.weight)
        if info.n_seen_classes <= n_old:
            return
        new = grown_linear(None, self.feature_size, info.n_seen_classes).weight.detach().to(self.weight)
        new[:n_old] = self.weight.detach()
        self.weight = nn.Parameter(new, requires_grad=self.weight.requires_grad)

    def forward(self, features: Tensor, task_labels: Tensor) -> Tensor:
        """features [B, D] → logits [B, K] (of tokens [B, T, D] → [B, T, K]); the task is not looked at."""
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=1))
