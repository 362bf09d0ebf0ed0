"""GDumb: a greedy sampler and a dumb learner (Prabhu et al. 2020, Algorithm 1).

    θ_t = argmin_θ 1/|M_t| Σ_{(x,y) ∈ M_t} ℓ(f(x; θ), y),  starting from θ_0

A class-balanced memory M_t is all that is kept, and after each experience a model is trained on it alone, starting from
the initial (random or pretrained) weights. The paper trains when it is asked for a prediction; here that is after each
experience. Its sampler keeps a class's first samples up to capacity / classes and throws samples of the largest class
out at random; here each class keeps a uniform sample of its own, which is the same where samples come in random order,
and otherwise (a domain that changes under the same classes) not only the first that came. Places that a small class
leaves go to the others.

The learning rate is annealed as in the authors' code (SGDR, Loshchilov & Hutter 2017): a tenth in the first epoch, then
cosine cycles of 1, 2, 4, … epochs from the optimizer's rate down to `minimum` times that, changed from epoch to epoch.
A `scheduler` other than `constant` takes its place. CutMix is left out.

Costs `capacity` stored samples and a copy of the backbone's initial weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le
from torch import Tensor

from clplatform.memory.buffer import Buffer
from clplatform.strategy.base import Strategy
from clplatform.types import Data, Experience, ExperienceInfo, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner


class GDumb(Strategy):
    """Train a fresh model on a balanced memory, and on nothing else.

    Args:
        capacity: samples in the memory.
        epochs: passes over the memory after each experience; None: the trainer's.
        minimum: lowest learning rate of a cycle, as a share of the optimizer's; None: no annealing.
        device: where the memory lives.
    """

    family = "replay"
    needs = frozenset({"memory"})
    excludes = frozenset({"baseline", "replay", "expansion", "isolation", "projection"})
    first_experience_is_finetuning = False
    why_not = "every experience starts from the initial weights and is trained on the memory only"

    def __init__(
        self,
        *,
        capacity: Annotated[int, Ge(1)],
        epochs: Annotated[int, Ge(1)] | None,
        minimum: Annotated[float, Ge(0), Le(1)] | None,
        device: str,
    ) -> None:
        self.buffer = Buffer(capacity=capacity, policy="class_balanced", device=device)
        self.epochs, self.minimum = epochs, minimum
        self.initial: dict[str, Tensor] | None = None

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        # Structure is built before weights are loaded, so also after a resume these are the initial ones.
        if self.initial is None:
            self.initial = {n: t.detach().cpu().clone() for n, t in learner.backbone.state_dict().items()}

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.buffer.add_all(experience.train, learner.generator)
        if experience.index == 0:
            return
        assert self.initial is not None
        learner.backbone.load_state_dict(self.initial)
        learner.head = learner.fresh_head()

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        return self.buffer.as_data()

    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        return [Stage("memory", max_epochs=self.epochs)]

    def before_epoch(self, learner: Learner) -> None:
        if self.minimum is None or learner.trainer.lr_scheduler_configs:
            return
        share = annealed(learner.current_epoch, self.minimum)
        for group in learner.trainer.optimizers[0].param_groups:  # saved with the optimizer, also in an epoch's middle
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])

    def cost(self) -> dict[str, int | float]:
        initial = (self.initial or {}).values()
        return {"extra_parameters": sum(t.numel() for t in initial if t.is_floating_point()), **self.buffer.cost()}

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)


def annealed(epoch: int, minimum: float) -> float:
    """The rate of an epoch (0 is the first) as a share of the full one: 0.1, then cycles of 1, 2, 4, … epochs."""
    if epoch == 0:
        return 0.1
    length = 2 ** (epoch.bit_length() - 1)
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * (epoch - length) / length)) / 2
