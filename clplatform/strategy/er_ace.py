"""Experience replay with asymmetric cross-entropy (Caccia et al. 2022, ER-ACE).

    L = E_{(x,y)~B} ℓ(f(x), y; C_curr) + E_{(x,y)~M} ℓ(f(x), y; C_old ∪ C_curr),  ℓ(z, y; C) = −log e^{z_y} / Σ_{c∈C} e^{z_c}

New samples compete among the classes of their own batch only (`classes: batch`, as in the paper) or of the current
experience, so that they do not push the earlier classes' logits down; replayed samples compete among all classes seen.
The loss is the sum of the two means, as in the authors' code. The memory is a reservoir, filled and used from the first
steps on, within an experience too; a sample competes for a place when it is trained on for the first time. Rows that
other strategies replay count as replayed.

Costs `capacity` stored samples, and |M| more samples in every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from clplatform.memory.buffer import Buffer, append, pick, raw_rows
from clplatform.strategy.base import Strategy
from clplatform.types import Batch, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class ERACE(Strategy):
    """Replay with a loss that keeps new samples from changing the earlier classes.

    Args:
        capacity: samples in the memory.
        batch_size: samples drawn in each step; None: as many as the batch has.
        classes: those that new samples compete among: of the `batch` or of the `experience`.
        device: where the memory lives.
    """

    family = "replay"
    needs = frozenset({"memory"})
    first_experience_is_finetuning = False
    why_not = "the memory is used from the first steps on, within the first experience too"

    def __init__(
        self,
        *,
        capacity: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)] | None,
        classes: Literal["batch", "experience"],
        device: str,
    ) -> None:
        self.buffer = Buffer(capacity=capacity, device=device)
        self.batch_size, self.classes = batch_size, classes

    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        if not len(self.buffer):
            return batch
        rows = self.buffer.sample(self.batch_size or len(batch["labels"]), learner.generator)
        return append(batch, rows, learner.source_of(self))

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        """Cross-entropy of the new rows among the current classes."""
        new, answer = pick(batch, output, batch["source"] == 0)
        classes = self._current(learner, new["labels"])
        # Columns are left out rather than masked: label smoothing is over the classes that compete.
        new["labels"] = torch.searchsorted(classes, new["labels"])
        return learner.task_loss(new, Output(answer.logits[:, classes], answer.features))

    def _current(self, learner: Learner, labels: Tensor) -> Tensor:
        """The classes that new samples compete among, sorted, int64 [C]."""
        if self.classes == "batch":
            return labels.unique()
        assert learner.experience is not None
        return torch.tensor(learner.experience.classes, device=labels.device)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        replayed, answer = pick(batch, output, batch["source"] != 0)
        return {"replayed": learner.task_loss(replayed, answer)} if len(replayed["labels"]) else {}

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        if learner.current_epoch == 0:
            self.buffer.add(raw_rows(batch), learner.generator)

    def cost(self) -> dict[str, int | float]:
        return self.buffer.cost()

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
