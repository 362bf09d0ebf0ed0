"""Subspaces that the inputs of linear layers take up, found from their energies (Saha et al. 2021, Eq. 5–9).

The columns of R [d, n] are inputs of a layer; all that is kept of them is R Rᵀ, summed in double precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 1e-12  # of energies summed in double precision


def inside(change: Tensor, basis: Tensor) -> Tensor:
    """The part of the rows of `change` [·, d] that lies in the span of `basis` [d, k]."""
    basis = basis.to(change)
    return (change @ basis) @ basis.T


@contextmanager
def collected_energy(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """R Rᵀ [d, d], in double precision, of the inputs of each of these linear layers in the calls inside."""
    energies: dict[str, Tensor] = {}
    last: list[Tensor] = []  # an input and its energy: queries, keys and values have the same

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not last or inputs[0] is not last[0]:
                rows = inputs[0].detach().flatten(0, -2).double()
                last[:] = inputs[0], rows.T @ rows
            energies[name] = energies.get(name, 0) + last[1]

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield energies
    finally:
        for handle in handles:
            handle.remove()


def grown_basis(basis: Tensor | None, energy: Tensor, share: float) -> Tensor:
    """An orthonormal basis [d, k], float32, that starts with `basis` and holds this share of the energy R Rᵀ [d, d]."""
    d = len(energy)
    old = energy.new_zeros(d, 0) if basis is None else basis.to(energy)
    outside = torch.eye(d).to(energy) - old @ old.T
    values, vectors = torch.linalg.eigh(outside @ energy @ outside)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = energy.trace()
    held = total - values.sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])  # by the first 0 … d of them
    n = int((held < share * total - ROUNDING * total).sum())
    n = min(n, d - old.shape[1])
    # Once more orthogonal to what there is: rounding to float32 left it almost so.
    new = torch.linalg.qr(outside @ vectors[:, :n]).Q
    return torch.cat([old, new], dim=1).float()


def complement(basis: Tensor) -> Tensor:
    """An orthonormal basis [d, d − k], float32, of what is orthogonal to an orthonormal basis [d, k]."""
    d, k = basis.shape
    return torch.linalg.qr(basis.double(), mode="complete").Q[:, k:].float() if k else torch.eye(d).to(basis)


def leading_directions(energy: Tensor, outside: Tensor, n: int) -> Tensor:
    """The n orthonormal directions [n, d], float32, that have most of the energy R Rᵀ [d, d] in a subspace.

    Args:
        outside: the projection [d, d] onto it, in double precision.

    Returns:
        Rows of zeros take the place of directions that have no energy, which would be arbitrary ones.
    """
    values, vectors = torch.linalg.eigh(outside @ energy @ outside)
    values, vectors = values.flip(0)[:n], vectors.flip(1)[:, :n]
    found = torch.linalg.qr(outside @ vectors[:, values > ROUNDING * energy.trace()]).Q
    directions = energy.new_zeros(n, len(energy))
    directions[: found.shape[1]] = found.T
    return directions.float()


class DualMemory:
    """The subspace that earlier inputs of each layer take up, kept as the smaller of two orthonormal bases: its own or its
    complement's (DualGPM, Liang & Li 2023, "Adaptive Plasticity Improvement for Continual Learning").

    Attributes:
        bases: [d, k ≤ d/2] by the name of the layer.
        dual: is it the complement's?
    """

    def __init__(self) -> None:
        self.bases: dict[str, Tensor] = {}
        self.dual: dict[str, bool] = {}

    def outside(self, name: str, energy: Tensor) -> Tensor:
        """The projection onto the complement, of the shape, dtype and device of `energy` [d, d]."""
        if name not in self.bases:
            return torch.eye(len(energy)).to(energy)
        basis = self.bases[name].to(energy)
        return basis @ basis.T if self.dual[name] else torch.eye(len(energy)).to(energy) - basis @ basis.T

    def add(self, name: str, energy: Tensor, share: float) -> None:
        """Let the subspace grow until it holds this share of the energy R Rᵀ [d, d] of new inputs."""
        basis = self.bases.get(name)
        if basis is not None and self.dual[name]:
            basis = complement(basis)
        basis = grown_basis(basis, energy, share)
        self.dual[name] = 2 * basis.shape[1] > len(energy)
        self.bases[name] = complement(basis) if self.dual[name] else basis

    def n_floats(self) -> int:
        """Numbers that it holds."""
        return sum(basis.numel() for basis in self.bases.values())

    def state_dict(self) -> dict[str, Any]:
        return {"bases": dict(self.bases), "dual": dict(self.dual)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bases, self.dual = dict(state["bases"]), dict(state["dual"])
