"""All checks. Each function says in its first line what a strategy promises, and raises `Broken` where it does not keep it, or
`DoesNotApply`."""

from __future__ import annotations

from collections.abc import Callable

from clplatform.check.access import (
    batch_size_of_passes,
    leaves_the_model_as_it_was,
    reads_only_what_it_may,
    task_ids_stay_hidden,
)
from clplatform.check.behaviour import (
    acts,
    classes_come_back,
    composes,
    evaluates_what_is_there,
    finite,
    learns,
    learns_text,
    learns_without_boundaries,
    teachers,
)
from clplatform.check.declarations import cost, declares, first_experience
from clplatform.check.memories import memory, memory_is_uniform, memory_of_text
from clplatform.check.persistence import predicts_when_loaded, reproducible, resumes, state, takes_updates
from clplatform.check.subject import Subject

CHECKS: list[Callable[[Subject], None]] = [
    declares, first_experience, acts, learns, learns_text, learns_without_boundaries, classes_come_back, finite, teachers,
    composes, reproducible, state, resumes, takes_updates, predicts_when_loaded, evaluates_what_is_there, reads_only_what_it_may,
    task_ids_stay_hidden, leaves_the_model_as_it_was, batch_size_of_passes, cost, memory, memory_of_text, memory_is_uniform,
]  # fmt: skip


def title(check: Callable[[Subject], None]) -> str:
    """The promise, without its backticks."""
    return (check.__doc__ or check.__name__).partition("\n")[0].replace("`", "")
