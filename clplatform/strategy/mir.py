"""Maximally interfered retrieval (Aljundi et al. 2019, Section 3.1: ER-MIR with the criterion MI-1).

    s(x) = ℓ(f(x; θ_v), y) − ℓ(f(x; θ), y),  θ_v = θ − η ∇L(f(X_t; θ), Y_t)

Candidates are drawn from the memory at random, and those whose loss would rise most if a step were taken on the
incoming batch alone are trained on along with it. The step is plain gradient descent and only thought: losses and
gradient are computed in eval mode on weights of their own, so that the model, its statistics, the optimizer and the
random numbers stay as they are, and no candidate is preferred for its dropout mask. The samples are compared before
augmentation, and the loss is the mean over both batches; the authors' code sums two means.

The memory is filled as by plain replay: with `update: experience` candidates come from earlier experiences, as in the
authors' code; with `batch` from the current one too.

Costs `capacity` stored samples, and in every step from the second experience on the forward and backward pass of the
batch once more and two forward passes of the candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.func import functional_call

from clplatform.memory.buffer import Buffer, append, raw_rows
from clplatform.module.mode import eval_mode
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class MIR(Strategy):
    """Replay the samples that the next step would harm most.

    Args:
        capacity: samples in the memory.
        batch_size: samples replayed in each step; None: as many as the batch has.
        candidates: drawn for each sample that is replayed.
        step: η; None: the optimizer's learning rates.
        update: after each `experience`, or with every `batch` of its first epoch.
        device: where the memory lives.
    """

    family = "replay"
    problems = PROBLEMS
    needs = frozenset({"memory"})

    def __init__(
        self,
        *,
        capacity: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)] | None,
        candidates: Annotated[int, Ge(1)],
        step: Annotated[float, Gt(0)] | None,
        update: Literal["experience", "batch"],
        device: str,
    ) -> None:
        self.buffer = Buffer(capacity=capacity, device=device)
        self.batch_size, self.candidates, self.step, self.update = batch_size, candidates, step, update
        self.ready = False  # is there the memory of an earlier experience?

    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        if not (self.ready or (self.update == "batch" and len(self.buffer))):
            return batch
        n, device = self.batch_size or len(batch["labels"]), batch["labels"].device
        rows = self.buffer.sample(self.candidates * n, learner.generator)
        rows = {name: value.to(device, non_blocking=True) for name, value in rows.items()}
        scores = self.interference(learner, batch, rows)
        chosen = scores.topk(min(n, len(scores))).indices
        return append(batch, {name: value[chosen] for name, value in rows.items()}, learner.source_of(self))

    def interference(self, learner: Learner, batch: Batch, rows: Batch) -> Tensor:
        """By how much the loss of each of `rows` would rise after a step on `batch`, [N]. Changes nothing."""
        with eval_mode(*learner.children()):  # the learner itself still trains, which strategies may ask
            moved = self._after_step(learner, batch)
            with torch.no_grad():
                now = learner.task_loss(rows, learner(rows), "none")
                return learner.task_loss(rows, functional_call(learner, moved, (rows,)), "none") - now

    def _after_step(self, learner: Learner, batch: Batch) -> dict[str, Tensor]:
        """θ_v of the parameters that the step would change, by name."""
        rates = self._rates(learner)
        named = {n: p for n, p in learner.named_parameters() if p.requires_grad and id(p) in rates}
        loss = learner.task_loss(batch, learner(batch))
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        moves = zip(named.items(), gradients, strict=True)
        return {name: p.detach() - rates[id(p)] * g for (name, p), g in moves if g is not None}

    def _rates(self, learner: Learner) -> dict[int, Any]:
        """η of each parameter, by its identity."""
        if self.step is not None:
            return {id(p): self.step for p in learner.parameters()}
        groups = learner.trainer.optimizers[0].param_groups
        return {id(p): group["lr"] for group in groups for p in group["params"]}

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        if self.update == "batch" and learner.current_epoch == 0:
            self.buffer.add(raw_rows(batch), learner.generator)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.update == "experience":
            self.buffer.add_all(experience.train, learner.generator)
        self.ready = True

    def cost(self) -> dict[str, int | float]:
        return self.buffer.cost()

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "ready": self.ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.ready = state["ready"]
