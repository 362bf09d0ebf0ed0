"""The diagonal of the Fisher information, from per-sample gradients.

    F_i = 1/N Σ_n E_y [ (∂ log p(y|x_n, θ) / ∂θ_i)² ]

with the expectation over y taken exactly over all classes (`exact`), by one label drawn from the model
(`sampled`), or at the true label (`empirical`). van de Ven (2025, "On the Computation of the Fisher Information
in Continual Learning") compares them. The gradient is squared sample by sample: the square of a batch's mean
gradient is something else, tens of times smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clplatform.regularization.per_sample import mean_over_batch, mean_over_data
from clplatform.types import IGNORED, Batch, Data, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

Kind = Literal["exact", "sampled", "empirical"]


def fisher_diagonal(learner: Learner, data: Data, kind: Kind, samples: int | None = None) -> dict[str, Tensor]:
    """Diagonal Fisher information of the trainable parameters, by name.

    The model runs in eval mode and is left as it was, batch-norm statistics included.

    Args:
        samples: use so many, drawn without repetition with the learner's generator; None: all.
    """

    def passes(batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        labels, weights = _labels(learner, batch, kind)
        for k in range(labels.shape[1]):
            yield {**batch, "labels": labels[:, k]}, weights[:, k]

    return mean_over_data(learner, data, surprise, torch.square, samples=samples, passes=passes)


def fisher_of_batch(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Diagonal Fisher information at the true labels, over the rows of a batch."""
    return mean_over_batch(learner, batch, surprise, torch.square)


def surprise(output: Output, row: Batch) -> Tensor:
    """−log p(y|x) of one sample."""
    return F.cross_entropy(output.logits.float().flatten(0, -2), row["labels"].flatten(), reduction="sum")


@torch.no_grad()
def _labels(learner: Learner, batch: Batch, kind: Kind) -> tuple[Tensor, Tensor]:
    """Labels [B, L] (of tokens [B, L, T]) to take the gradient at, and their weights [B, L] in the expectation."""
    if kind == "empirical":
        labels = batch["labels"][:, None]
        return labels, torch.ones(labels.shape[:2], device=labels.device)
    probabilities = learner(batch).logits.float().softmax(-1)
    if kind == "exact":
        return torch.arange(probabilities.shape[1], device=probabilities.device).expand_as(probabilities), probabilities
    drawn = torch.multinomial(probabilities.flatten(0, -2).cpu(), 1, generator=learner.generator)
    labels = drawn.to(probabilities.device).view_as(batch["labels"])
    if labels.ndim == 2:  # tokens, each after those that really came before it
        labels = labels.masked_fill(batch["labels"] == IGNORED, IGNORED)
    return labels[:, None], torch.ones(len(labels), 1, device=labels.device)
