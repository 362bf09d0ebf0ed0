"""Learning without Forgetting (Li & Hoiem 2016, Eq. 1–5).

    L = L_new + λ · τ² · KL( softmax(z_old*/τ) ‖ softmax(z_old/τ) )

z_old* are the logits that the model before this experience (frozen, in eval mode) gives for the old classes on
the current batch, z_old those of the model now. The paper writes the cross-entropy, which has the same gradient
and differs by the teacher's entropy; KL is zero when nothing has changed. τ² keeps the gradient's size when τ
changes (Hinton et al. 2015). Where task ids are known there is one such term for each earlier task's classes, as
in the paper's multi-head setting; else one over all old classes, for each token where tokens are predicted. Rows that other strategies add are distilled too.

Costs one copy of the model and one forward pass of it in each step, from the second experience on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from clplatform.data import predicted
from clplatform.strategy.base import Strategy
from clplatform.types import PROBLEMS, Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner
    from clplatform.teacher import Teacher


class LwF(Strategy):
    """Keep the answers of the previous model on the new data.

    Args:
        strength: λ.
        temperature: τ.
    """

    family = "distillation"
    problems = PROBLEMS
    needs = frozenset({"boundaries"})

    def __init__(self, *, strength: Annotated[float, Ge(0)], temperature: Annotated[float, Gt(0)]) -> None:
        self.strength, self.temperature = strength, temperature
        self.teacher: Teacher | None = None

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        # The head has grown already: the teacher's new rows are untrained, and not used.
        self.teacher = learner.snapshot() if experience.index > 0 else None

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.teacher is None:
            return {}
        target = self.teacher(batch)
        if not learner.info.task_ids or not learner.info.has_classes:
            n_old = learner.n_old_classes
            now, then = (predicted(batch, logits)[:, :n_old] for logits in (output.logits, target.logits))
            divergence = distillation(now, then, self.temperature)
        else:
            divergence = output.logits.new_zeros(())
            for task, classes in {e.task_label: list(e.classes) for e in learner.seen[:-1]}.items():
                label = torch.full_like(batch["task_labels"], task)
                pair = learner.classify(output.features, label), self.teacher.classify(target.features, label)
                now, then = (predicted(batch, logits)[:, classes] for logits in pair)
                divergence = divergence + distillation(now, then, self.temperature)
        return {"lwf": self.strength * divergence}

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.teacher.n_parameters() if self.teacher else 0}


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ² KL(teacher ‖ student) of logits [B, K], mean over the batch."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
