"""Ridge regression from sums over samples, and the choice of its strength on held-out samples.

    W = (G + λ I)⁻¹ C,  G = Hᵀ H,  C = Hᵀ Y

H [N, M] are features and Y [N, K] targets, all in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Numbers of H that are held at once: bounds memory.
CHUNK_FLOATS = 2**24

Project = Callable[[Tensor], Tensor]  # [n, D] → [n, M]


def add(gram: Tensor, cross: Tensor, project: Project, features: Tensor, target: Tensor) -> None:
    """Add samples to G [M, M] and C [M, K], in place: features [N, D] and targets [N, K]."""
    for x, y in _chunks(len(gram), features, target):
        h = project(x)
        gram.addmm_(h.T, h)
        cross.addmm_(h.T, y)


def solve(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """W [M, K]."""
    rounding = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().sum()
    if strength > rounding:
        damped = gram.clone()
        damped.diagonal().add_(strength)
        return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ (damping(values, [strength])[0][:, None] * (vectors.T @ cross))


def damping(values: Tensor, strengths: Sequence[float]) -> Tensor:
    """1 / (v + λ) of eigenvalues v [n] for all λ [L]: [L, n]; 0 where v is zero but for rounding, since C has no part
    in these directions but for rounding either."""
    present = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    return present / (values.clamp_min(0) + torch.tensor(strengths).to(values)[:, None])


def best_strength(
    project: Project, fitted: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], gram: Tensor, cross: Tensor,
    strengths: Sequence[float],
) -> float:  # fmt: skip
    """The strength whose regression has the smallest squared error on held-out samples.

    One eigendecomposition serves all strengths: of G, or of H Hᵀ where there are fewer samples than features; then
    W = Hᵀ (H Hᵀ + λ I)⁻¹ Y.

    Args:
        fitted: features [N, D] and targets [N, K] to fit on; `gram` and `cross` are their sums.
        held: the same of the held-out samples, at least one.
    """
    size = len(gram)
    if len(fitted[0]) < size:
        h = project(fitted[0])
        values, vectors = torch.linalg.eigh(h @ h.T)
        right, left = vectors.T @ fitted[1], h.T @ vectors
    else:
        values, left = torch.linalg.eigh(gram)
        right = left.T @ cross
    scale = damping(values, strengths)
    errors = torch.zeros(len(strengths)).to(scale)
    for x, y in _chunks(size, *held):
        h = project(x) @ left
        errors += torch.stack([((h * s) @ right - y).square().sum() for s in scale])
    return strengths[int(errors.argmin())]


def _chunks(size: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(column.split(max(1, CHUNK_FLOATS // size)) for column in columns), strict=True)
