"""L2P (Wang et al. 2022, "Learning to Prompt for Continual Learning", CVPR, Sec. 4).

    L = ℓ(g(f̄(x; P_s1 … P_sN)), y) + λ Σ_i (1 − cos(q(x), k_si)),  s1 … sN = the N keys nearest to q(x)

A frozen Transformer reads, beside a sample, N prompts (tokens that are learned) from a pool of M. q(x) are the features of
the bare backbone; f̄ is the mean of what the N · L prompt tokens become, which is what the head g sees. With `mask` the loss
ℓ is over the experience's own classes, as in the authors' code, and old classifiers stay as they are, to the bit. Task ids
are not used.

Prompts are chosen for each sample; the authors' code takes a vote among the samples of a batch, in evaluation too, which
lets a sample's answer depend on its neighbours. Prompts start from the authors' U(0, 0.01), keys from U(−1, 1): from
U(0, 0.01) all of them point the same way. A pool may collapse to the same few prompts for all samples: `l2p_chosen`, logged
with the loss, is the share of the pool that the experience has chosen so far (N/M: always the same prompts), and the pool's
`usage` counts choices over the whole run. `diversify` weighs distances with how often earlier experiences chose a prompt
(Sec. 4.2).

Costs M · (L + 1) · D parameters and a second pass of each sample, without gradients; in training only where samples are
augmented, or else one pass for each experience, whose features are held while it lasts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clplatform.module import prompt
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.data import Loader
    from clplatform.learner import Learner


class Pool(nn.Module):
    """M prompts of L tokens, and their keys."""

    usage: Tensor  # int64 [M]: how often each was chosen, in training

    def __init__(self, size: int, length: int, dim: int) -> None:
        super().__init__()
        self.prompts, self.keys = prompt.uniform(size, length, dim), prompt.uniform(size, dim, low=-1, high=1)
        self.register_buffer("usage", torch.zeros(size, dtype=torch.int64))


class L2P(Strategy):
    """A pool of prompts, from which each sample takes those whose keys are nearest.

    Args:
        pool: M, prompts.
        length: L, tokens of a prompt.
        choose: N, prompts that a sample takes.
        strength: λ, of the term that pulls the chosen keys towards the samples.
        diversify: in training, prefer what earlier experiences chose less?
        features: what the head sees: the mean of what the `prompts` become, or what the `backbone` makes of the sample's own
            tokens beside them.
        mask: is the loss over the experience's own classes only?
        lr: learning rate of prompts, keys and head; None: the optimizer's.
    """

    family = "prompt"
    needs = frozenset({"boundaries", "pretrained", "transformer"})
    excludes = FAMILIES - {"regularization", "prototype"}
    first_experience_is_finetuning = False
    why_not = (
        "it trains prompts on a frozen backbone, and rows of earlier experiences, or a copy of the model, would get prompts "
        "that are not theirs"
    )

    def __init__(
        self,
        *,
        pool: Annotated[int, Ge(1)],
        length: Annotated[int, Ge(1)],
        choose: Annotated[int, Ge(1)],
        strength: Annotated[float, Ge(0)],
        diversify: bool,
        features: Literal["prompts", "backbone"],
        mask: bool,
        lr: Annotated[float, Gt(0)] | None,
    ) -> None:
        if choose > pool:
            raise ValueError(f"choose={choose} is more than the {pool} prompts of the pool; give pool={choose} or more")
        self.size, self.length, self.n, self.strength = pool, length, choose, strength
        self.diversify, self.features, self.mask, self.lr = diversify, features, mask, lr
        self.queries = prompt.Queries()
        self.before: Tensor | None = None  # usage before this experience, [M]
        self.chosen: tuple[Tensor, Tensor] | None = None  # by a training batch: prompts and their similarities, [B, N]
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        learner.backbone.requires_grad_(False)
        if "l2p" not in learner.extras:
            prompt.check_soft_prompts("l2p", learner.backbone, learner.info.input)
            size: Any = learner.backbone.feature_size
            learner.extras["l2p"] = Pool(self.size, self.length, size).to(learner.device)
        self.extra = prompt.size_of(self.pool(learner))

    @staticmethod
    def pool(learner: Learner) -> Any:
        return learner.extras["l2p"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.before = self.pool(learner).usage.clone()

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return prompt.without_decay(groups, self.lr)

    def loader(self, learner: Learner, loader: Loader) -> Loader:
        self.queries.prepare(learner, loader.data)
        return loader

    # -- the step -------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        pool, learns = self.pool(learner), learner.training and learner.experience is not None
        similarity = prompt.cosine(self.queries(learner, batch), pool.keys)
        chosen = self.nearest(similarity.detach(), weighted=learns)
        if learns:
            self.chosen = chosen, similarity.gather(1, chosen)
        with prompt.soft_prompts(learner.backbone, pool.prompts[chosen].flatten(1, 2)) as outputs:
            features = learner.backbone(batch)
        return run({**batch, "features": outputs[-1].mean(1) if self.features == "prompts" else features})

    def nearest(self, similarity: Tensor, *, weighted: bool) -> Tensor:
        """The prompts to take, nearest first; cosines [B, M] → int64 [B, N]."""
        distance = 1 - similarity
        if weighted and self.diversify and self.before is not None and self.before.any():
            distance = distance * (self.before / self.before.sum())
        return distance.topk(self.n, largest=False).indices

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        return prompt.task_loss(learner, batch, output, mask=self.mask)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        assert self.chosen is not None
        (chosen, similarity), self.chosen = self.chosen, None
        self.pool(learner).usage += torch.bincount(chosen.flatten(), minlength=self.size)
        return {"keys": self.strength * (1 - similarity).sum(1).mean()}

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        if self.before is not None:
            chosen = (self.pool(learner).usage > self.before).float().mean()
            learner.last_terms = {**learner.last_terms, "l2p_chosen": chosen}

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.queries.clear()

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.before = None

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}
