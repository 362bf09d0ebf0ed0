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


def best_spans(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best answer of each text.

    Args:
        logits: [B, 2, T], T > 1.

    Returns:
        The first and the last token [B, 2] of the span of at most `LONGEST` tokens with the largest sum of its logits; that
        sum [B]; and the sum [B] of (0, 0), where there is no text, which says that there is no answer.
    """
    start, end = logits.float().unbind(1)
    n = start.shape[1]
    best, ends = start + end, torch.arange(n, device=logits.device).repeat(len(start), 1)
    for more in range(1, min(LONGEST, n)):
        longer, places = start[:, 1 : n - more] + end[:, 1 + more :], slice(1, n - more)
        better = longer > best[:, places]
        best[:, places] = torch.where(better, longer, best[:, places])
        ends[:, places] = torch.where(better, torch.arange(1 + more, n, device=ends.device), ends[:, places])
    first = 1 + best[:, 1:].argmax(1, keepdim=True)
    return torch.cat([first, ends.gather(1, first)], 1), best.gather(1, first)[:, 0], best[:, 0]


def over_windows(questions: Tensor, score: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
    """The answer to each question of whose context the windows are parts (Devlin et al. 2019, § 4.3): the best span of all its
    windows; none, if that has at least its score even in the window where it has the lowest.

    Args:
        questions: int64 [N], the question of each window.
        score, none: [N], of the best span of the window, and of no answer in it.

    Returns:
        For each question, in the order of their first windows: the window in which its best span is, int64 [Q]; and whether
        it has an answer, bool [Q].
    """
    _, of = questions.unique(return_inverse=True)
    n, rows = int(of.max()) + 1 if len(of) else 0, torch.arange(len(of))
    best = torch.full((n,), -torch.inf).scatter_reduce(0, of, score, "amax")
    least = torch.full((n,), torch.inf).scatter_reduce(0, of, none, "amin")
    late = torch.full((n,), len(of))
    window = late.scatter_reduce(0, of, torch.where(score == best[of], rows, len(of)), "amin")
    order = late.scatter_reduce(0, of, rows, "amin").argsort()
    return window[order], (best > least)[order]
