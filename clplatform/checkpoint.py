"""Checkpoints: atomic, checked by a checksum, loaded without unpickling.

A run keeps at most three, in `<run>/checkpoints/`:

* `experience.ckpt`: after the last complete experience (weights and strategy state). Here every random
  generator is seeded anew, so none is stored.
* `stage.ckpt`: after the last complete stage of an unfinished experience with several stages.
* `step.ckpt`: in the middle of a stage: what Lightning saves (optimizer, loops, precision) and ours.

Resuming loads the first, runs `before_experience` (teachers and snapshots are made again from the very
weights they were made from), then goes on from the most recent of the other two.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO

from clplatform.files import atomic_write
from clplatform.types import ClplatformError

MAGIC = b"clplatform checkpoint 1\n"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a nested dict of tensors and plain values.

    The file is `MAGIC`, the SHA-256 of the rest, and PyTorch's serialisation of `state`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    atomic_write(path, MAGIC + hashlib.sha256(payload).digest() + payload)


def load(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        ClplatformError: the file is missing, is something else, or is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ClplatformError(f"there is no checkpoint {path}") from None
    if not content.startswith(MAGIC):
        raise ClplatformError(f"{path} is not a checkpoint of clplatform")
    payload = content[len(MAGIC) + 32 :]
    if hashlib.sha256(payload).digest() != content[len(MAGIC) : len(MAGIC) + 32]:
        raise ClplatformError(f"{path} is damaged (its checksum differs); delete it to go on from the one before")
    return torch.load(io.BytesIO(payload), map_location=map_location, weights_only=True)


class AtomicCheckpointIO(CheckpointIO):
    """Makes Lightning save and load through `save` and `load`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # What Lightning fills from hyper-parameters may hold anything; we keep none there.
        save(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class StepCheckpoint:
    """Saves in the middle of a stage, every so many batches or minutes, and when asked to stop (SIGTERM).

    The learner calls it when the strategies are done with a batch. It saves never with gradients half
    accumulated, never at the last batch of an epoch, and not while a strategy has a state that cannot be saved.

    Args:
        path: the file.
        every_n_batches: None: no such rhythm.
        every_minutes: None: no such rhythm.
        unsaved: what cannot be saved now.
    """

    def __init__(
        self,
        path: Path,
        *,
        every_n_batches: int | None,
        every_minutes: float | None,
        unsaved: Callable[[], list[str]] = list,
    ) -> None:
        self.path, self.every_n_batches, self.every_minutes = path, every_n_batches, every_minutes
        self.unsaved = unsaved
        self.batches = 0
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        if self.every_n_batches and self.batches >= self.every_n_batches:
            return True
        return bool(self.every_minutes) and time.monotonic() - self.saved_at >= 60 * float(self.every_minutes or 0)

    def after_batch(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Called by the learner after the strategies have seen the batch."""
        self.batches += 1
        last = batch_idx + 1 >= trainer.num_training_batches
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if not (last or accumulating) and (self.due() or trainer.received_sigterm):
            if not self.unsaved():
                trainer.save_checkpoint(self.path)
            self.batches, self.saved_at = 0, time.monotonic()
