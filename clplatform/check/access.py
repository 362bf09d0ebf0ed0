"""What a strategy must not read or change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clplatform import checkpoint
from clplatform.check.persistence import flat
from clplatform.check.promise import DoesNotApply, promise
from clplatform.check.subject import Subject
from clplatform.check.world import TinyBackbone, same
from clplatform.data import TensorData


def reads_only_what_it_may(subject: Subject) -> None:
    """It never reads the future, test data, or earlier samples that it has not declared to keep."""
    found = subject.run(guarded=True).seen.problems.get("reads", [])
    promise(not found, f"it read {'; '.join(found[:3])}")


def task_ids_stay_hidden(subject: Subject) -> None:
    """Where the stream hides task ids, those of the rows are not used."""
    if subject.scenario == "task_incremental":
        raise DoesNotApply("it needs task ids")
    stream = subject.stream()
    wrong = []
    for e in stream.experiences:
        splits = {}
        for split in ("train", "validation", "test"):
            columns = dict(getattr(e, split).columns)
            columns["task_labels"] = 1 + columns["index"] % 5
            splits[split] = TensorData(columns)
        wrong.append(replace(e, **splits))
    stream.experiences = wrong
    run = subject.new_run(stream=stream)
    promise(same(run.after[1], subject.run().after[1]), "with other task ids on the rows it learns other weights")
    promise(run.results.matrix == subject.run().results.matrix, "with other task ids on the rows it predicts otherwise")


def leaves_the_model_as_it_was(subject: Subject) -> None:
    """Passes over data before and after an experience leave batch-norm statistics and every module's mode alone."""
    options: dict[str, Any] = {} if subject.transformer else {"backbone": TinyBackbone(0.2, norm=True)}
    experiment = subject.blank(**options)
    chain, learner, found = experiment.learner.chain, experiment.learner, []
    fresh = {n: b.clone() for n, b in learner.backbone.named_buffers()}

    @contextmanager
    def unchanged(door: str) -> Iterator[None]:
        modes = {m: m.training for m in learner.modules()}
        buffers = {n: b.clone() for n, b in learner.backbone.named_buffers()}
        yield
        flipped = [n or "the model" for n, m in learner.named_modules() if m in modes and modes[m] != m.training]
        if flipped:
            found.append(f"{door} leaves {flipped[0]} in another mode")
        for n, b in learner.backbone.named_buffers():
            if n in buffers and not torch.equal(b, buffers[n]) and not torch.equal(b, fresh[n]):
                found.append(f"{door} changes {n}: run passes over data in eval mode")

    for door in ("before_experience", "after_experience"):
        original = getattr(chain, door)

        def wrapped(*args: Any, _door: str = door, _original: Callable[..., None] = original) -> None:
            with unchanged(_door):
                _original(*args)

        setattr(chain, door, wrapped)
    experiment.run()
    promise(not found, "; ".join(dict.fromkeys(found)))


def batch_size_of_passes(subject: Subject) -> None:
    """What it computes in passes over data (importances, means, bases) does not depend on the batch size of the pass."""
    small, large = (state_after_one(subject, size) for size in (3, 64))
    if not any(isinstance(v, Tensor) and v.is_floating_point() for v in small.values()):
        raise DoesNotApply("its state after an experience has no numbers")
    for path, value in small.items():
        other = large.get(path)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.is_floating_point():
            promise(
                close(value, other),
                f"{path} is another where the pass has batches of 3 than where it has 64: are gradients of whole batches "
                "taken for those of samples?",
            )


def state_after_one(subject: Subject, batch_size: int) -> dict[str, Any]:
    """The state after the first experience."""
    folder = subject.folder()
    subject.new_run(folder=folder, kill=0, batch_size=batch_size)
    return flat(checkpoint.load(folder / "checkpoints" / "experience.ckpt")["strategy"])


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, or bases of one space."""
    if a.shape != b.shape:
        return False
    scale = float(torch.maximum(a.abs().max(), b.abs().max())) if a.numel() else 0.0
    if torch.allclose(a, b, rtol=1e-2, atol=1e-4 * scale):
        return True
    return a.ndim == 2 and torch.allclose(a @ a.mT, b @ b.mT, rtol=1e-2, atol=1e-4 * scale**2)
