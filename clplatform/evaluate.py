"""Evaluation: predictions on one experience, one row of the accuracy matrix, the confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from clplatform.data import by_length
from clplatform.learner import Learner
from clplatform.module.mode import eval_mode
from clplatform.types import Data, Experience, Stream


def predict(learner: Learner, data: Data, batch_size: int) -> Tensor:
    """The class predicted for every sample, int64 [N] on the CPU. The model's mode is left as it was."""
    predicted = []
    data, back = by_length(data)
    # inference_mode is left before anything is kept: what is returned may be used anywhere.
    with eval_mode(learner), torch.inference_mode(), learner.precision_context():
        for batch in learner.batches(data, batch_size=batch_size):
            predicted.append(learner(batch).logits.argmax(1))
    return torch.cat(predicted).cpu()[back] if predicted else torch.zeros(0, dtype=torch.int64)


def accuracy(learner: Learner, data: Data, batch_size: int) -> float | None:
    """Share of samples whose class is predicted (every sample counts the same); None without samples."""
    if len(data) == 0:
        return None
    return (predict(learner, data, batch_size) == data.labels).float().mean().item()


def has_meaning(learner: Learner, experience: Experience) -> bool:
    """Can this experience be predicted yet? Not before the model has its classes; with task ids, as its task's."""
    own = [e for e in learner.seen if not learner.info.task_ids or e.task_label == experience.task_label]
    return set(experience.classes) <= {c for e in own for c in e.classes}


def evaluate_row(learner: Learner, stream: Stream, split: str, batch_size: int) -> list[float | None]:
    """The primary metric on every experience of the stream's `split`; None where it has no meaning."""
    row: list[float | None] = []
    for experience in stream:
        data: Data | None = getattr(experience, split)
        if data is None or not has_meaning(learner, experience):
            row.append(None)
        else:
            row.append(accuracy(learner, data, batch_size))
    return row


def confusion(learner: Learner, stream: Stream, batch_size: int) -> list[list[int]]:
    """Counts [K][K] over the test data of all experiences that have meaning: rows true, columns predicted."""
    k = learner.n_classes
    counts = torch.zeros(k * k, dtype=torch.int64)
    for experience in stream:
        if has_meaning(learner, experience):
            cell = experience.test.labels * k + predict(learner, experience.test, batch_size)
            counts += torch.bincount(cell, minlength=k * k)
    return counts.view(k, k).tolist()
