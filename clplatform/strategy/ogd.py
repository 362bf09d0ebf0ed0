"""Orthogonal gradient descent (Farajtabar et al. 2020, "Orthogonal Gradient Descent for Continual Learning", Alg. 1).

    g̃ = g − Σ_{v ∈ S} (g·v) v
    S ← S ∪ orthonormalised { ∇_θ f_y(x, θ) : (x, y) among the samples of the experience }

f_y is the logit of the true class (the variant OGD-GTL), taken in eval mode after the experience. To first order no step
changes these logits. S is an orthonormal basis of all stored gradients; the paper's Gram-Schmidt is done by a singular
value decomposition, which leaves out what depends on the rest up to rounding. Rows that a head gains later are zeros in
the older gradients.

What is projected is the gradient that the optimizer gets, as in the paper: all losses, accumulated, not clipped yet. SGD
with momentum stays orthogonal to S; the preconditioning of Adam and weight decay do not.

Costs as many numbers as the model has parameters for each stored gradient, at most `capacity` of them, and in each step
two products with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from clplatform.module.mode import eval_mode
from clplatform.strategy.base import Strategy
from clplatform.types import Data, Experience

if TYPE_CHECKING:
    from clplatform.learner import Learner

CHUNK = 16  # samples whose gradients are taken in one pass: its work and memory grow with their square
DEPENDENT = 1e-5  # of the largest gradient: what is shorter, once it is orthogonal to the rest, is rounding


class OGD(Strategy):
    """Step orthogonally to the gradients of earlier experiences' logits.

    Args:
        samples: training samples of each experience whose gradients are stored.
        capacity: most gradients stored; when it is reached, later experiences store none.
    """

    family = "projection"
    needs = frozenset({"boundaries", "memory"})
    excludes = frozenset({"expansion"})
    why_not = "gradients are stored for the parameters that are trained in every experience"

    def __init__(self, *, samples: Annotated[int, Ge(1)], capacity: Annotated[int, Ge(1)]) -> None:
        self.samples, self.capacity = samples, capacity
        self.basis: dict[str, Tensor] = {}  # S: [k, *shape] by parameter

    @property
    def n_stored(self) -> int:
        return len(next(iter(self.basis.values()))) if self.basis else 0

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """Zeros where a parameter has grown."""
        if self.basis:
            named = trained(learner)
            self.basis = {name: self.fitted(name, p) for name, p in named.items()}

    def fitted(self, name: str, parameter: Tensor) -> Tensor:
        """The basis' part [k, *shape] for a parameter as it is now."""
        whole = parameter.new_zeros(self.n_stored, *parameter.shape)
        if name in self.basis:
            old = self.basis[name].to(whole)
            whole[tuple(slice(n) for n in old.shape)] = old
        return whole

    @torch.no_grad()
    def edit_gradients(self, learner: Learner) -> None:
        pairs = [(p, self.basis[name].flatten(1)) for name, p in trained(learner).items() if name in self.basis]
        inner = [S @ p.grad.flatten() for p, S in pairs if p.grad is not None]
        if not inner:
            return
        total = torch.stack(inner).sum(0)
        for p, S in pairs:
            change = (total @ S).view_as(p)
            p.grad = -change if p.grad is None else p.grad.sub_(change)

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        n = min(self.samples, self.capacity - self.n_stored)
        if n <= 0:
            return
        named = trained(learner)
        rows = torch.randperm(len(experience.train), generator=learner.generator)[:n]
        new = torch.cat(list(gradients(learner, experience.train.select(rows), list(named.values()))))
        old = torch.cat([self.fitted(name, p).flatten(1) for name, p in named.items()], dim=1)
        parts = orthonormal(old, new).split([p.numel() for p in named.values()], dim=1)
        self.basis = {name: S.reshape(-1, *p.shape).clone() for (name, p), S in zip(named.items(), parts, strict=True)}

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": sum(S.numel() for S in self.basis.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"basis": dict(self.basis)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.basis = dict(state["basis"])


def trained(learner: Learner) -> dict[str, Tensor]:
    return {name: p for name, p in learner.named_parameters() if p.requires_grad}


def gradients(learner: Learner, data: Data, parameters: list[Tensor]) -> Iterator[Tensor]:
    """Gradients [B, P] of the logit of each sample's class; the model is in eval mode meanwhile."""
    with eval_mode(learner):
        for batch in learner.batches(data, batch_size=CHUNK):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                logits = learner(batch).logits.gather(1, batch["labels"][:, None])[:, 0]
                each = torch.eye(len(logits)).to(logits)
                found = torch.autograd.grad(logits, parameters, each, is_grads_batched=True, allow_unused=True)
            yield torch.cat(
                [
                    p.new_zeros(len(logits), p.numel()) if g is None else g.flatten(1)
                    for p, g in zip(parameters, found, strict=True)
                ],
                dim=1,
            )


def orthonormal(old: Tensor, new: Tensor) -> Tensor:
    """`old` [k, P], which is orthonormal, and after it what `new` [n, P] spans beyond: [k + at most n, P]."""
    longest = new.norm(dim=1).max()
    for _ in range(2):  # once leaves what rounding makes of large components
        new = new - (new @ old.T) @ old
    _, sizes, directions = torch.linalg.svd(new, full_matrices=False)
    return torch.cat([old, directions[sizes > DEPENDENT * longest]])
