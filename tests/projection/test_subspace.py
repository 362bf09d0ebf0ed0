"""Subspaces of layers' inputs against NumPy's SVD of the inputs themselves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from clplatform.projection.subspace import (
    DualMemory,
    collected_energy,
    complement,
    grown_basis,
    leading_directions,
)


def samples(d: int, n: int, seed: int, decay: float = 0.6) -> Tensor:
    """R [d, n] in double precision, whose directions have energies that fall off."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return mix @ (decay ** torch.arange(d)[:, None] * torch.randn(d, n, generator=generator, dtype=torch.float64))


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def test_energies_are_of_all_calls_and_positions_whoever_shares_an_input() -> None:
    layers = {name: nn.Linear(5, 2) for name in ("a", "b", "c")}
    x, y, z = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(2, 5)
    with collected_energy(layers) as energies:
        for name in ("a", "b"):  # the same tensor twice, as queries and keys have it
            layers[name](x)
        layers["c"](z)
        layers["a"](y)
    layers["a"](z)  # not inside
    expected = {"a": [x, y], "b": [x], "c": [z]}
    assert energies.keys() == expected.keys()
    for name, inputs in expected.items():
        rows = torch.cat([v.flatten(0, -2) for v in inputs]).double()
        torch.testing.assert_close(energies[name], rows.T @ rows, rtol=1e-12, atol=1e-12)


def test_the_complement_completes_a_basis() -> None:
    for k in (0, 1, 3, 6):
        basis = torch.linalg.qr(samples(6, 6, 0)).Q[:, :k].float()
        rest = complement(basis)
        assert rest.shape == (6, 6 - k)
        both = torch.cat([basis, rest], dim=1)
        torch.testing.assert_close(both.T @ both, torch.eye(6), rtol=0, atol=1e-6)


def svd_grown(old: np.ndarray, r: np.ndarray, share: float) -> np.ndarray:
    """The directions of R beside `old`, as few as hold this share of R's energy together with it."""
    u, s, _ = np.linalg.svd(r - old @ (old.T @ r), full_matrices=False)
    held, k = ((old.T @ r) ** 2).sum(), 0
    while held < share * (r**2).sum():
        held, k = held + s[k] ** 2, k + 1
    return np.concatenate([old, u[:, :k]], axis=1)


def test_a_dual_memory_holds_what_a_basis_would_in_the_smaller_form() -> None:
    memory, expected, kinds = DualMemory(), np.zeros((8, 0)), []
    for t, share in enumerate((0.7, 0.9, 0.99, 0.999)):
        r = samples(8, 30, t)
        memory.add("layer", r @ r.T, share)
        expected = svd_grown(expected, r.numpy(), share)
        outside = memory.outside("layer", eye(8))
        np.testing.assert_allclose(outside, np.eye(8) - expected @ expected.T, atol=1e-5)
        k = expected.shape[1]
        assert memory.dual["layer"] == (k > 4)
        assert memory.n_floats() == 8 * min(k, 8 - k)
        kinds.append(memory.dual["layer"])
    assert kinds[0] is False
    assert kinds[-1] is True
    again = DualMemory()
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again.outside("layer", eye(8)), memory.outside("layer", eye(8)))


def test_a_full_memory_stays_full() -> None:
    memory = DualMemory()
    for t in range(3):
        r = samples(4, 9, t)
        memory.add("layer", r @ r.T, 1.0)
        assert memory.bases["layer"].shape == (4, 0)
        assert not memory.outside("layer", eye(4)).any()
    assert torch.equal(memory.outside("other", eye(4)), eye(4))  # of which nothing is known


def test_leading_directions_are_singular_vectors_of_what_lies_outside() -> None:
    old, r = samples(9, 4, 1), samples(9, 40, 2)
    basis = grown_basis(None, old @ old.T, 1.0).double()
    outside = eye(9) - basis @ basis.T
    found = leading_directions(r @ r.T, outside, 3).double()
    u, s, _ = np.linalg.svd((outside @ r).numpy())
    assert s[2] > 1.1 * s[3]  # else they would not be unique
    assert found.shape == (3, 9)
    np.testing.assert_allclose(np.abs(found.numpy() @ u[:, :3]), np.eye(3), atol=1e-5)  # up to their signs
    assert (found @ old).abs().max() < 1e-6


def test_where_no_energy_is_left_there_is_no_direction() -> None:
    r = samples(6, 2, 0)  # two directions, of which one is taken
    taken = torch.linalg.qr(r).Q[:, :1]
    found = leading_directions(r @ r.T, eye(6) - taken @ taken.T, 4).double()
    assert found.shape == (4, 6)
    torch.testing.assert_close(found @ found.T, torch.diag(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)))
    assert leading_directions(r @ r.T, eye(6), 8).shape == (8, 6)  # more than there can be
