"""Gradient projection memory (Saha et al. 2021, "Gradient Projection Memory for Continual Learning", Eq. 5–9).

    W ← W + ΔW (I − M Mᵀ)
    M ← [M, U_k],  R̂ = R − M Mᵀ R = U Σ Vᵀ
    k = min{ k : ‖R_proj‖² + ‖R̂_k‖² ≥ ε ‖R‖² },  R_proj = M Mᵀ R

The columns of R [d, n] are the inputs of a linear layer on samples of an experience (in eval mode, all positions of a
sequence, padding included), the columns of M [d, k] an orthonormal basis of what they span, up to 1 − ε of their energy.
M is found from the eigenvectors of R Rᵀ, summed in double precision, so no inputs are kept.

The paper projects the gradient, which with plain SGD is the step. Momentum of Adam, its preconditioning and weight decay
take a step out of the subspace, so here the gradient and the step really taken are both projected: W x stays as it was
for every x in the span of M, whatever the optimizer, up to rounding. The paper's layers have no biases and its norms are
fixed after the first task: whatever in the backbone is not the weight of a linear layer (biases, norms and their
statistics, embeddings, convolutions) learns in the first experience only. The head is not projected, as in the paper.

Costs k·d numbers for each linear layer, at most d², and in training from the second experience on a copy of the layers'
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from clplatform.projection.subspace import collected_energy, grown_basis, inside
from clplatform.strategy.base import Run, Strategy
from clplatform.types import Batch, Experience, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GPM(Strategy):
    """Change linear layers only where the inputs of earlier experiences do not reach.

    Args:
        threshold: ε of the first experience.
        increase: by how much ε grows with each experience, up to 1.
        samples: training samples of an experience whose inputs are collected.
    """

    family = "projection"
    needs = frozenset({"boundaries"})
    excludes = frozenset({"expansion"})
    why_not = "layers that are added later have no inputs of earlier experiences"

    def __init__(
        self,
        *,
        threshold: Annotated[float, Gt(0), Le(1)],
        increase: Annotated[float, Ge(0)],
        samples: Annotated[int, Ge(1)],
    ) -> None:
        self.threshold, self.increase, self.samples = threshold, increase, samples
        self.bases: dict[str, Tensor] = {}  # M [d, k] by the name of the layer
        self.before: dict[str, Tensor] = {}  # weights before the step, while it is taken

    # -- training -------------------------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if not self.bases:
            return
        projected = {f"{name}.weight" for name in self.bases}
        for name, p in learner.backbone.named_parameters():
            p.requires_grad_(p.requires_grad and name in projected)
        for name, basis in self.bases.items():
            self.bases[name] = basis.to(learner.device)

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if learner.training and self.bases:
            for module in learner.backbone.modules():
                if isinstance(module, NORMS):
                    module.eval()
        return run(batch)

    @torch.no_grad()
    def edit_gradients(self, learner: Learner) -> None:
        for name, weight in self.weights(learner):
            self.before[name] = weight.detach().clone()
            if weight.grad is not None:
                weight.grad.sub_(inside(weight.grad, self.bases[name]))

    @torch.no_grad()
    def after_step(self, learner: Learner) -> None:
        for name, weight in self.weights(learner):
            weight.sub_(inside(weight - self.before[name], self.bases[name]))
        self.before = {}

    def weights(self, learner: Learner) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights [·, d] of the layers that have a basis, while they are trained."""
        for name in self.bases:
            weight: Any = learner.backbone.get_submodule(name).weight
            if weight.requires_grad:
                yield name, weight

    # -- the end of an experience ---------------------------------------------------------------------------------
    @torch.no_grad()
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        rows = torch.randperm(len(experience.train), generator=learner.generator)[: self.samples]
        with collected_energy(trained_layers(learner.backbone)) as energies:
            learner.features(experience.train.select(rows))
        share = min(1.0, self.threshold + experience.index * self.increase)
        for name, energy in energies.items():
            self.bases[name] = grown_basis(self.bases.get(name), energy, share)

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": sum(basis.numel() for basis in self.bases.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"bases": dict(self.bases)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bases, self.before = dict(state["bases"]), {}


def trained_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """Linear layers that are trained, by name."""
    return {n: m for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
