"""One classifier for each task ("multi-head"): a sample is classified by its own task's, among its own task's classes.

All classifiers are rows of one weight, so a batch of mixed tasks is one matrix product and a gather. A task that comes
back finds its classifier; tasks may share classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplatform.head.linear import grown_linear
from clplatform.types import MASKED, ExperienceInfo


class MultiHead(nn.Module):
    """Logits over all classes, `MASKED` where the sample's task has no such class.

    Args:
        feature_size: D, given by the platform.
    """

    needs = frozenset({"task_ids"})
    row_of: Tensor  # [T, K]: row of a task's class in the weight, −1: the task has no such class

    def __init__(self, *, feature_size: int) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.linear: nn.Linear | None = None
        # Metadata alone tells it, so it is rebuilt rather than loaded.
        self.register_buffer("row_of", torch.full((0, 0), -1, dtype=torch.int64), persistent=False)

    def grow(self, info: ExperienceInfo) -> None:
        """Make room for this experience's task and classes; idempotent."""
        shape = max(self.row_of.shape[0], info.task_label + 1), max(self.row_of.shape[1], info.n_seen_classes)
        row_of = self.row_of.new_full(shape, -1)
        row_of[: self.row_of.shape[0], : self.row_of.shape[1]] = self.row_of
        new = [c for c in info.classes if row_of[info.task_label, c] < 0]
        n_rows = 0 if self.linear is None else self.linear.out_features
        row_of[info.task_label, new] = torch.arange(n_rows, n_rows + len(new), device=row_of.device)
        self.row_of = row_of
        if new:
            self.linear = grown_linear(self.linear, self.feature_size, n_rows + len(new))

    def forward(self, features: Tensor, task_labels: Tensor) -> Tensor:
        """features [B, D] (of tokens [B, T, D]), task_labels [B] → logits [B, K] ([B, T, K])."""
        assert self.linear is not None, "grow() comes first"
        rows = self.row_of[task_labels]
        if features.ndim == 3:
            rows = rows[:, None].expand(-1, features.shape[1], -1)
        logits = self.linear(features).gather(-1, rows.clamp_min(0))
        return logits.masked_fill(rows < 0, MASKED)
