"""CODA-Prompt (Smith et al. 2023, "CODA-Prompt: COntinual Decomposed Attention-based Prompting", CVPR, Sec. 4).

    p = Σ_m α_m P_m,  α_m = cos(q(x) ⊙ A_m, K_m);  L = ℓ(f(x; p), y) + λ Σ_{B ∈ P, K, A} ‖B Bᵀ − I‖² / M²

A frozen Transformer with prefixes of its attention in several layers, each a weighted sum of components: P_m a component, K_m
its key, A_m what it attends to in the query q(x), the features of the bare backbone. Each experience adds components, and
those of earlier ones stay in the sum, fixed to the bit. With `mask` the loss ℓ is over the experience's own classes, as in
the authors' code, and the classifiers of earlier classes are fixed to the bit too. Task ids are not used.

‖·‖² is divided by the entries of the M × M matrix, as in the authors' code (which in one version multiplies it by 10⁻⁶ too),
and summed over layers. New components start orthonormal, and orthogonal to the earlier ones, as far as there is room.

Costs M_t · (2 L + 2) · D numbers for each layer and experience, and a second pass of each sample, without gradients; in
training only where samples are augmented, or else one pass for each experience, whose features are held while it lasts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.module import prompt
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.data import Loader
    from clplatform.learner import Learner


class Components(nn.Module):
    """For each experience, prompts P [layers, M_t, 2·L·D], keys K and attentions A [layers, M_t, D]."""

    def __init__(self, layers: int, per_experience: int, length: int, dim: int) -> None:
        super().__init__()
        self.layers, self.n, self.length, self.dim = layers, per_experience, length, dim
        self.prompts, self.keys, self.attentions = (nn.ParameterList() for _ in range(3))

    def kinds(self) -> tuple[Any, Any, Any]:
        return self.prompts, self.keys, self.attentions

    def all(self) -> list[Tensor]:
        """P, K and A of all experiences, [layers, M, …]."""
        return [torch.cat(list(parts), 1) for parts in self.kinds()]

    def grow(self, index: int, device: torch.device) -> None:
        """Make room for this experience; idempotent."""
        for i in range(len(self.keys), index + 1):
            for parts, size in zip(self.kinds(), (2 * self.length * self.dim, self.dim, self.dim), strict=True):
                old = torch.cat([p.detach() for p in parts], 1).cpu() if i else torch.zeros(self.layers, 0, size)
                new = torch.stack([orthonormal(self.n, rows) for rows in old])
                parts.append(nn.Parameter(new.to(device)))

    def learn(self, index: int) -> None:
        """Let nothing but what belongs to this experience be trained."""
        for parts in self.kinds():
            for i, p in enumerate(parts):
                p.requires_grad_(i == index)

    def forward(self, queries: Tensor) -> Tensor:
        """Queries [B, D] → keys and values [B, layers, 2, L, D]."""
        prompts, keys, attentions = self.all()
        weights = attend(queries, keys, attentions)
        summed = torch.einsum("blm,lmx->blx", weights, prompts.to(weights))
        return summed.unflatten(2, (2, self.length, self.dim))

    def far_from_orthonormal(self) -> Tensor:
        """Σ over layers and P, K, A of the mean of (B Bᵀ − I)²."""
        grams = [b @ b.transpose(1, 2) for b in self.all()]
        return sum(((g - torch.eye(g.shape[1]).to(g)) ** 2).mean((1, 2)).sum() for g in grams)  # type: ignore[return-value]


def orthonormal(n: int, old: Tensor) -> Tensor:
    """n random rows of length 1, orthogonal to each other and to the rows of `old` [M, D], as far as there is room."""
    rows = torch.randn(n, old.shape[1])
    if len(old) + n > old.shape[1]:
        return F.normalize(rows, dim=1)
    if len(old):
        basis = torch.linalg.qr(old.T).Q
        rows = rows - rows @ basis @ basis.T
    return torch.linalg.qr(rows.T).Q.T.contiguous()


def attend(queries: Tensor, keys: Tensor, attentions: Tensor) -> Tensor:
    """cos(q ⊙ A_m, K_m); [B, D], [layers, M, D] twice → [B, layers, M]. Without a tensor of B × M × D."""
    q = queries.to(keys)
    product = torch.einsum("bd,lmd->blm", q, attentions * F.normalize(keys, dim=2))
    return product / torch.einsum("bd,lmd->blm", q**2, attentions**2).clamp_min(1e-24).sqrt()


class CODAPrompt(Strategy):
    """Prefixes that are sums of components, weighted by attention.

    Args:
        layers: that have prefixes; 1 is the first.
        components: M_t, that each experience adds.
        length: L, rows of a prefix: so many keys, and as many values.
        strength: λ, of the term that keeps components orthonormal.
        mask: is the loss over the experience's own classes only?
        lr: learning rate of components and head; None: the optimizer's.
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
        layers: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)],
        components: Annotated[int, Ge(1)],
        length: Annotated[int, Ge(1)],
        strength: Annotated[float, Ge(0)],
        mask: bool,
        lr: Annotated[float, Gt(0)] | None,
    ) -> None:
        self.layers, self.n, self.length = layers, components, length
        self.strength, self.mask, self.lr = strength, mask, lr
        self.queries = prompt.Queries()
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        learner.backbone.requires_grad_(False)
        if "coda_prompt" not in learner.extras:
            prompt.check_prefixes("coda_prompt", learner.backbone, learner.info.input, self.layers, "layers")
            size: Any = learner.backbone.feature_size
            learner.extras["coda_prompt"] = Components(len(self.layers), self.n, self.length, size)
        components = self.components(learner)
        components.grow(info.index, learner.device)
        self.extra = prompt.size_of(components)

    @staticmethod
    def components(learner: Learner) -> Any:
        return learner.extras["coda_prompt"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.components(learner).learn(experience.index)

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return prompt.without_decay(groups, self.lr)

    def loader(self, learner: Learner, loader: Loader) -> Loader:
        self.queries.prepare(learner, loader.data)
        return loader

    # -- the step -------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        keys, values = self.components(learner)(self.queries(learner, batch)).unbind(2)
        by_layer = {layer: (keys[:, i], values[:, i]) for i, layer in enumerate(self.layers)}
        with prompt.prefixes(learner.backbone, by_layer):
            features = learner.backbone(batch)
        return run({**batch, "features": features})

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        return prompt.task_loss(learner, batch, output, mask=self.mask)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.strength:
            return {}
        return {"orthonormal": self.strength * self.components(learner).far_from_orthonormal()}

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.queries.clear()

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}
