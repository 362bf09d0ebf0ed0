"""Cross-entropy of classes and of tokens, smoothed over what may be said at all."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from clplatform.types import IGNORED, MASKED


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, reduction: str, *, over_allowed: bool) -> Tensor:
    """Logits [B, K], labels [B]; or of tokens [B, T, K] and [B, T]: then the mean is over all tokens of the batch, and a
    sample's own loss ("none": [B]) the sum over its tokens.

    Args:
        smoothing: 0 … 1.
        reduction: as in PyTorch.
        over_allowed: smooth over the classes that are not masked; see `smoothed`.
    """
    if smoothing and over_allowed:
        return smoothed(logits, labels, smoothing, reduction)
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
    if reduction == "mean":
        labels, logits = labels.flatten(), logits.flatten(0, 1)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=smoothing)
    each = F.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
    ).sum(1)
    return each if reduction == "none" else each.sum()


def smoothed(logits: Tensor, labels: Tensor, smoothing: float, reduction: str) -> Tensor:
    """Cross-entropy, smoothed over the classes that a sample may have: those that are masked would be nearly all of the
    loss. Logits [B, K] or [B, T, K], labels [B] or [B, T]."""
    absent = logits < MASKED / 2
    even = -logits.log_softmax(-1).masked_fill(absent, 0).sum(-1) / (~absent).sum(-1)
    exact = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    loss = ((1 - smoothing) * exact.view_as(labels) + smoothing * even).masked_fill(labels == IGNORED, 0)
    if reduction == "mean":
        return loss.sum() / (labels != IGNORED).sum()
    each = loss if labels.ndim == 1 else loss.sum(1)
    return each if reduction == "none" else each.sum()
