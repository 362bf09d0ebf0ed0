"""Momentum distillation: the model's own moving average teaches it (Michel et al. 2024, "Rethinking Momentum
Knowledge Distillation in Online Continual Learning"; the average is that of Tarvainen & Valpola 2017, Section 2).

    L(θ) = L_t(θ) + λ · τ² · KL( softmax(f(x; θ̄)/τ) ‖ softmax(f(x; θ)/τ) ),    θ̄ = α θ̄ + (1 − α) θ after each step

over the batch as the model sees it, rows that other strategies replay included, and over all classes seen. α is at most
1 − 1/(t+1) in step t, as in the code of Tarvainen & Valpola. No experience's end needs to be known: the teacher follows
the student through the whole stream, at a distance of about 1/(1 − α) steps. The paper combines it with replay and
distils a second, unaugmented view; its α is our 1 − α, and it predicts with the mean of both models' weights, where
here one of them does (Tarvainen & Valpola: the teacher).

Costs one copy of the model and one forward pass of it in each step. A saved model holds both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from clplatform.data import predicted
from clplatform.module.average import Average
from clplatform.strategy.base import Run, Strategy
from clplatform.types import PROBLEMS, Batch, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class EMATeacher(Strategy):
    """Keep the answers of the model's own moving average.

    Args:
        strength: λ.
        temperature: τ.
        decay: α.
        predict: who answers outside of training, the `teacher` or the `student`.
    """

    family = "distillation"
    problems = PROBLEMS
    excludes = frozenset({"expansion"})
    first_experience_is_finetuning = False
    why_not = "an average of the whole model teaches from the first steps on"

    def __init__(
        self,
        *,
        strength: Annotated[float, Ge(0)],
        temperature: Annotated[float, Gt(0)],
        decay: Annotated[float, Ge(0), Le(1)],
        predict: Literal["teacher", "student"],
    ) -> None:
        self.strength, self.temperature, self.decay, self.predict = strength, temperature, decay, predict
        self.extra = 0

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if "ema_teacher" not in learner.extras:
            learner.extras["ema_teacher"] = Average(learner)
        self.teacher(learner).grow(learner)
        self.extra = self.teacher(learner).n_floats()

    @staticmethod
    def teacher(learner: Learner) -> Average:
        teacher: Any = learner.extras["ema_teacher"]
        return teacher

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        target = self.teacher(learner)(learner, batch).logits
        rows = (predicted(batch, logits) for logits in (output.logits, target))
        log_student, log_teacher = (F.log_softmax(z / self.temperature, dim=1) for z in rows)
        divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return {"ema_teacher": self.strength * self.temperature**2 * divergence}

    def after_step(self, learner: Learner) -> None:
        self.teacher(learner).update(learner, self.decay)

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        # With gradients it is the student that is meant, whose importances others may ask for.
        if learner.training or torch.is_grad_enabled() or self.predict == "student":
            return run(batch)
        with self.teacher(learner).in_place_of(learner):
            return run(batch)

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}
