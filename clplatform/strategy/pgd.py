"""Projected gradient descent: adversarial training on token vectors (Madry et al. 2018, "Towards Deep Learning Models Resistant to
Adversarial Attacks", Eq. 2.1; on texts as Zhu et al. 2020, "FreeLB", describe it in Sec. 3.2).

    L(θ) = L_t(x) + λ L_t(x + s r_K),  r_{k+1} = Π_{‖r‖₂ ≤ ε} [r_k + α g_k / ‖g_k‖₂],  g_k = ∇_r L_t(x + s r_k)

The inner maximum over a ball around the vectors of a sample's tokens (an image's patches) is sought in K steps, from its centre
or a random point; norms are of one sample, over all its tokens. s = ‖x‖₂ / √n is the root mean square of its n numbers, or 1. L_t is the loss that is trained on, over all rows of the batch,
replayed ones too. K = 1 from the centre with α ≥ ε is the fast gradient method (`fgm`). Madry et al. train on x + r_K alone;
with texts the loss at x is kept (λ weighs the other). A random start is FreeLB's: uniform in a cube inside the ball. Padding is
not perturbed. All passes of a step but the first have the same dropout (FreeLB, Sec. 3.3).

Costs no parameters; in each step K forward and backward passes to the embeddings, and another forward and backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from clplatform.module.perturbation import Passes, applies, check_reach, perturbed, project, size
from clplatform.strategy.base import Strategy
from clplatform.types import Batch, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class PGD(Strategy):
    """Train on the worst token vectors that are found nearby, too.

    Args:
        epsilon: ε, the radius of the ball.
        relative: are ε and α in units of s?
        steps: K.
        step_size: α.
        start: at the ball's centre (`zero`) or at a `random` point.
        strength: λ.
    """

    family = "regularization"
    needs = frozenset({"transformer"})
    excludes = frozenset({"prototype", "plugin"})
    first_experience_is_finetuning = False
    why_not = "the loss at perturbed token vectors is part of every training step, in the first experience too"

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Ge(0)],
        relative: bool,
        steps: Annotated[int, Ge(1)],
        step_size: Annotated[float, Gt(0)],
        start: Literal["zero", "random"],
        strength: Annotated[float, Ge(0)],
    ) -> None:
        self.epsilon, self.relative, self.steps, self.step_size = epsilon, relative, steps, step_size
        self.start, self.strength = start, strength
        self.shape: tuple[int, ...] | None = None  # of an image's vectors

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        check_reach("pgd", learner)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not applies(learner):
            return {}
        with perturbed(learner, batch, self.shape, relative=self.relative) as passes:
            r = self.first(learner, passes)
            for _ in range(self.steps):
                r = project(r + self.step_size * passes.direction(r), self.epsilon)
            loss = passes.loss(r)
        self.shape = passes.shape
        return {"pgd": self.strength * loss}

    def first(self, learner: Learner, passes: Passes) -> Tensor:
        """r_0: zero, or uniform within ± ε / √n for each of a sample's n numbers, so that it is in the ball."""
        zeros = passes.zeros()
        if self.start == "zero":
            return zeros
        uniform = 2 * torch.rand(zeros.shape, generator=learner.generator).to(zeros) - 1
        return uniform * passes.mask() * self.epsilon / size(zeros, passes.mask()).sqrt()
