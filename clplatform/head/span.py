"""The head of extractive question answering (Devlin et al. 2019, § 4.2): where the answer starts, and where it ends.

    logits[b, 0, t] = w_start · h_bt + b_start,   logits[b, 1, t] = w_end · h_bt + b_end

The classes are the places of a text: cross-entropy over T, once for each end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplatform.types import MASKED, Batch, ExperienceInfo

LONGEST = 30  # tokens of an answer


class SpanHead(nn.Module):
    """Logits of the two ends of a span over the tokens of a text.

    Args:
        feature_size: D.
    """

    def __init__(self, *, feature_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_size, 2)

    def grow(self, info: ExperienceInfo) -> None:
        """Nothing: later experiences have no classes of their own."""

    def forward(self, features: Tensor, task_labels: Tensor) -> Tensor:
        """Features of tokens [B, T, D] → logits [B, 2, T]; the task is not looked at."""
        return self.linear(features).transpose(1, 2)


def close_places(batch: Batch, logits: Tensor) -> Tensor:
    """Logits [B, 2, T] with those of places where no answer may start or end (`answerable` [B, T] is 0) at `MASKED`; logits
    of batches without that column as they are."""
    if "answerable" not in batch:
        return logits
    return logits.masked_fill(batch["answerable"][:, None] == 0, MASKED)


def best_spans(logits: Tensor) -> Tensor:
    """Logits [B, 2, T] → the first and the last token [B, 2] of the span of at most `LONGEST` tokens with the largest sum of
    its logits. At place 0 there is no text: only the span (0, 0) begins there, which says that there is no answer."""
    start, end = logits.float().unbind(1)
    n = start.shape[1]
    best, ends = start + end, torch.arange(n, device=logits.device).repeat(len(start), 1)
    for more in range(1, min(LONGEST, n)):
        longer, places = start[:, 1 : n - more] + end[:, 1 + more :], slice(1, n - more)
        better = longer > best[:, places]
        best[:, places] = torch.where(better, longer, best[:, places])
        ends[:, places] = torch.where(better, torch.arange(1 + more, n, device=ends.device), ends[:, places])
    first = best.argmax(1, keepdim=True)
    return torch.cat([first, ends.gather(1, first)], 1)
