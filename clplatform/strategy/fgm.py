"""Fast gradient method: adversarial training on token vectors (Miyato, Dai & Goodfellow 2017, "Adversarial Training Methods for
Semi-Supervised Text Classification", Eq. 2–4; after Goodfellow, Shlens & Szegedy 2015).

    L(θ) = L_t(x) + λ L_t(x + r),  r = ε s g / ‖g‖₂,  g = ∇_x L_t(x),  s = ‖x‖₂ / √n

x are the vectors of a text's tokens (of an image's patches) before positions are added, and norms are of one sample, over all
its tokens; r is a constant when the weights are differentiated. L_t is the loss that is trained on, over all rows of the batch,
replayed ones too: they are as much in need of a smooth loss. Padding is not perturbed. The paper normalises the embeddings to
unit variance, so that ε means the same for all; pretrained weights do not allow it, and s, the root mean square of the sample's
n numbers, does as much. With `relative: false` s = 1, as in most code for pretrained models.

The gradient is of the second pass and r's loss of the third: both have the same dropout, and the first pass another. (With the
dropout of the first they would say less that is new; with a mask each, r would not be steepest for the loss that it raises.)

Costs no parameters; in each step a forward and backward pass to the embeddings, and another forward and backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from torch import Tensor

from clplatform.module.perturbation import applies, check_reach, perturbed
from clplatform.strategy.base import Strategy
from clplatform.types import Batch, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class FGM(Strategy):
    """Train on token vectors that are moved a step up the loss, too.

    Args:
        epsilon: ε, the length of a sample's perturbation; 0: the loss is taken once more where it is.
        relative: is it in units of s?
        strength: λ.
    """

    family = "regularization"
    needs = frozenset({"transformer"})
    excludes = frozenset({"prototype", "plugin"})
    first_experience_is_finetuning = False
    why_not = "the loss at perturbed token vectors is part of every training step, in the first experience too"

    def __init__(self, *, epsilon: Annotated[float, Ge(0)], relative: bool, strength: Annotated[float, Ge(0)]) -> None:
        self.epsilon, self.relative, self.strength = epsilon, relative, strength
        self.shape: tuple[int, ...] | None = None  # of an image's vectors

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        check_reach("fgm", learner)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not applies(learner):
            return {}
        with perturbed(learner, batch, self.shape, relative=self.relative) as passes:
            r = self.epsilon * passes.direction(passes.zeros())
            loss = passes.loss(r)
        self.shape = passes.shape
        return {"fgm": self.strength * loss}
