"""Experience replay (Robins 1995; Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning").

Every batch B of the current experience is extended by a batch M drawn from a memory of earlier samples, and
the loss is the mean over both:

    L = 1/(|B|+|M|) Σ_{(x,y) ∈ B ∪ M} ℓ(f(x), y)

After an experience each of its samples competes once for a place (so epochs do not count a sample twice):
`reservoir` keeps a uniform sample of all that was seen, `class_balanced` an equal share of each class, and `herding` an
equal share of each class whose mean feature is close to that of the whole class (Rebuffi et al. 2017, Alg. 4–5), with
the features that the model has after the experience; as classes arrive, what was chosen first stays. With
`update: batch` samples compete as they are trained on for the first time, and are drawn from then on, as in online
learning; herding needs the whole experience, and refuses it.

Costs `capacity` stored samples, and |M| more samples in every step from the second experience on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from clplatform.memory.buffer import Buffer, Policy, append, raw_rows
from clplatform.memory.herding import add_herded
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, ClplatformError, Experience, Output, StreamInfo

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Replay(Strategy):
    """Train on a memory of earlier samples along with the new ones.

    Args:
        capacity: samples in the memory.
        batch_size: samples drawn in each step; None: as many as the batch has.
        policy: which samples the memory keeps.
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
        policy: Literal["reservoir", "class_balanced", "herding"],
        update: Literal["experience", "batch"],
        device: str,
    ) -> None:
        self.herding = policy == "herding"
        if self.herding and update == "batch":
            raise ValueError("policy=herding chooses among all samples of an experience: give update=experience")
        kept: Policy = "class_balanced" if policy == "herding" else policy
        self.buffer = Buffer(capacity=capacity, policy=kept, device=device)
        self.batch_size, self.update = batch_size, update
        self.ready = False  # is there the memory of an earlier experience?

    def check(self, info: StreamInfo) -> None:
        if self.buffer.policy == "class_balanced" and info.several_labels:
            raise ClplatformError(
                f"strategy.replay.policy balances classes, and samples of stream={info.name} ({info.problem}) have no single one; "
                "give reservoir"
            )

    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        if not (self.ready or (self.update == "batch" and len(self.buffer))):
            return batch
        rows = self.buffer.sample(self.batch_size or len(batch["labels"]), learner.generator)
        return append(batch, rows, learner.source_of(self))

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        if self.update == "batch" and learner.current_epoch == 0:
            self.buffer.add(raw_rows(batch), learner.generator)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.herding:
            add_herded(self.buffer, experience.train, learner.features(experience.train), learner.generator)
        elif self.update == "experience":
            self.buffer.add_all(experience.train, learner.generator)
        self.ready = True

    def cost(self) -> dict[str, int | float]:
        return self.buffer.cost()

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "ready": self.ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.ready = state["ready"]
