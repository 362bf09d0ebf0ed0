"""Dark Experience Replay++ (Buzzega et al. 2020, DER: Eq. 5 and Algorithm 1, DER++: Eq. 6 and Algorithm 2).

    L = E_{(x,y)~B} ℓ(f(x), y) + α E_{(x',z')~M} ‖z' − h(x')‖² + β E_{(x'',y'')~M} ℓ(f(x''), y'')

A reservoir keeps samples with the logits z they had when they were stored; two batches are drawn from it in each
step. As in the paper the memory is filled and used from the first steps on, within an experience too, and a sample
competes each time it is trained on. ‖·‖² is the mean over the batch and over the logits, as in the authors' code.
The paper's head has all classes from the start, and z those to come too. Where it grows, z is 0 for a class that came
later, about what an untrained row gives: without it nothing holds new classes down on old samples, and DER forgets
like fine-tuning. Classes of other tasks are not compared.

With β = 0 this is DER (Eq. 5). Costs `capacity` samples with their logits, and two more batches in each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from clplatform.memory.buffer import Buffer, append, pick, raw_rows
from clplatform.strategy.base import Strategy
from clplatform.types import MASKED, Batch, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class DERpp(Strategy):
    """Replay samples along with the logits they once had.

    Args:
        capacity: samples in the memory.
        batch_size: samples in each of the two batches drawn in a step; None: as many as the batch has.
        alpha: α, weight of the logits' squared error.
        beta: β, weight of the replayed samples' cross-entropy.
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
        alpha: Annotated[float, Ge(0)],
        beta: Annotated[float, Ge(0)],
        device: str,
    ) -> None:
        self.buffer = Buffer(capacity=capacity, device=device)
        self.batch_size, self.alpha, self.beta = batch_size, alpha, beta
        self.target: Tensor | None = None  # stored logits [M, K of the widest] of the first batch drawn

    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        self.target = None
        if not len(self.buffer):
            return batch
        n, source = self.batch_size or len(batch["labels"]), learner.source_of(self)
        for part, weight in enumerate((self.alpha, self.beta)):
            if weight == 0:
                continue
            rows = self.buffer.sample(n, learner.generator)
            logits = rows.pop("logits")
            if part == 0:
                self.target = logits.to(batch["labels"].device)
            batch = append(batch, rows, source if part == 0 else -source)
        return batch

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        """Cross-entropy of the rows that are not our own."""
        others = batch["source"].abs() != learner.source_of(self)
        return learner.task_loss(*pick(batch, output, others))

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms, source = {}, learner.source_of(self)
        if self.target is not None:
            now = output.logits[batch["source"] == source]
            known = now > MASKED / 2
            gap = (now - _widen(self.target, now.shape[1])) ** 2 * known
            terms["logits"] = self.alpha * gap.sum() / known.sum()
        replayed = batch["source"] == -source
        if self.beta > 0 and len(self.buffer):
            terms["labels"] = self.beta * learner.task_loss(*pick(batch, output, replayed))
        return terms

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        self.target = None
        own = batch["source"] == 0
        rows = raw_rows(batch)
        rows["logits"] = output.logits[own]
        if "logits" in self.buffer.rows:  # a head that has grown
            self.buffer.rows["logits"] = _widen(self.buffer.rows["logits"], output.logits.shape[1])
        self.buffer.add(rows, learner.generator)

    def cost(self) -> dict[str, int | float]:
        return self.buffer.cost()

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)


def _widen(logits: Tensor, width: int) -> Tensor:
    """Logits [N, K] with zeros for the classes up to `width`."""
    return F.pad(logits, (0, width - logits.shape[1])) if logits.shape[1] < width else logits
