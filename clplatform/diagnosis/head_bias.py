"""How much of the forgetting is the head's: the features may still tell classes apart that the head no longer does.

The head is fitted again, on frozen features of training data of all experiences, every class of every experience with the
same weight. What the accuracy rises by is forgetting that was the head's and not the representation's:

    share_k = (refit_k − now_k) / (old_k − now_k),   old_k: right after experience k was learned

(Davari et al. 2022, "Probing Representation Forgetting in Supervised and Unsupervised Continual Learning"). The same is done
with the features of the untrained model: what their refitted head reaches owes nothing to what was learned.

The bias itself (Wu et al. 2019, "Large Scale Incremental Learning"; BiC): how often test samples of old classes are taken for
new ones, those of the last experience, and the margin max_{c old} z_c − max_{c new} z_c of the logits z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clplatform.diagnosis.layers import Reading
from clplatform.diagnosis.probes import balanced, fit_probe
from clplatform.types import ExperienceInfo

NOTHING = 0.01  # less average forgetting than this has no shares

Readings = Sequence[tuple[Reading, Reading]]  # of training and of test data, for each experience


def head_bias(
    experiences: Sequence[ExperienceInfo],
    final: Readings,
    untrained: Readings,
    old: Sequence[float | None],
    classes_of_task: Tensor | None,
) -> dict[str, Any]:
    """What the head's share is.

    Args:
        final, untrained: what these models make of the data of all experiences; no `untrained`: there is no such model.
        old: the accuracy of each experience right after it was learned.
        classes_of_task: [T, K], where a sample's task is known; else None.
    """
    n_classes = max(e.n_seen_classes for e in experiences)
    now = [accuracy(test) for _, test in final]
    refit = refitted(final, n_classes, classes_of_task)
    control = refitted(untrained, n_classes, classes_of_task) if untrained else [None] * len(experiences)
    shares = [share(a, b, c) for a, b, c in zip(old, now, refit, strict=True)]
    earlier = [k for k in range(len(experiences) - 1) if old[k] is not None and now[k] is not None]
    means = [mean([values[k] for k in earlier]) for values in (old, now, refit, control)]
    return {
        "old": list(old),
        "now": now,
        "refit": refit,
        "untrained_refit": control,
        "shares": shares[:-1],
        "forgotten": None if means[0] is None or means[1] is None else means[0] - means[1],
        "recovered": None if means[2] is None or means[1] is None else means[2] - means[1],
        "share": share(*means[:3]),
        "untrained_share": share(means[0], means[1], means[3]),
        "bias": bias(experiences, [test for _, test in final], known_tasks=classes_of_task is not None),
    }


def refitted(readings: Readings, n_classes: int, classes_of_task: Tensor | None) -> list[float | None]:
    """The accuracy on each experience with a head that is fitted to all of them."""
    train = [reading for reading, _ in readings]
    features, labels = (torch.cat([getattr(r, name) for r in train]) for name in ("features", "labels"))
    member = torch.cat([torch.full_like(r.labels, k) for k, r in enumerate(train)])
    tasks = torch.cat([r.task_labels for r in train])
    allowed = None if classes_of_task is None else classes_of_task[tasks]
    probe = fit_probe(features, labels, n_classes, weights=balanced(member, labels), allowed=allowed)
    return [
        probe.accuracy(t.features, t.labels, None if classes_of_task is None else classes_of_task[t.task_labels])
        for _, t in readings
    ]


def bias(experiences: Sequence[ExperienceInfo], tests: Sequence[Reading], *, known_tasks: bool) -> dict[str, Any]:
    """How far the answers lean to the newest classes; `left_out` says why there are none."""
    old_classes = {c for e in experiences[:-1] for c in e.classes}
    new = sorted(set(experiences[-1].classes) - old_classes)
    if known_tasks:
        return {"left_out": "a sample's task is known: old and new classes never compete for it"}
    if not new or not old_classes:
        return {"left_out": "the last experience brings no new classes"}
    old = sorted(old_classes)
    margins, taken = [], []
    for reading in tests:
        assert reading.logits is not None
        margins.append(reading.logits[:, old].amax(1) - reading.logits[:, new].amax(1))
        taken.append(torch.isin(reading.logits.argmax(1), torch.tensor(new)).double())
    return {
        "old_as_new": torch.cat(taken[:-1]).mean().item(),
        "old_as_new_each": [values.mean().item() for values in taken[:-1]],
        "new_as_old": 1 - taken[-1].mean().item(),
        "margin_old": torch.cat(margins[:-1]).mean().item(),
        "margin_new": margins[-1].mean().item(),
    }


def accuracy(reading: Reading) -> float | None:
    """Of the model's own answers."""
    if reading.logits is None or len(reading.labels) == 0:
        return None
    return (reading.logits.argmax(1) == reading.labels).double().mean().item()


def share(old: float | None, now: float | None, refit: float | None) -> float | None:
    """(refit − now) / (old − now); None where next to nothing was forgotten. Below 0 or above 1 as it comes."""
    if old is None or now is None or refit is None or old - now < NOTHING:
        return None
    return (refit - now) / (old - now)


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
