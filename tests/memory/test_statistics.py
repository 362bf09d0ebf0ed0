"""Running moments are those of all samples at once, and a readout computes what its weights say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from clplatform.memory.statistics import Moments, Readout, precise
from clplatform.types import MASKED


def samples(n: int = 200, d: int = 5, k: int = 4, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(k, (n,), generator=g)
    return torch.randn(n, d, generator=g) * torch.arange(1, d + 1) + labels[:, None] + offset, labels


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_moments_are_those_of_all_samples(size: int) -> None:
    """In batches of any size; NumPy, class by class."""
    x, y = samples()
    moments = Moments(5, scatter=True)
    for rows in torch.arange(200).split(size):
        moments.update(x[rows], y[rows], 4)
    within = np.zeros((5, 5))
    for k in range(4):
        own = x[y == k].double().numpy()
        np.testing.assert_allclose(moments.means[k].numpy(), own.mean(0), rtol=1e-12)
        within += np.cov(own.T, bias=True) * len(own)
        assert moments.counts[k] == len(own)
    assert moments.scatter is not None
    np.testing.assert_allclose(moments.scatter.numpy(), within, rtol=1e-10)
    np.testing.assert_allclose(moments.covariance.numpy(), within / 200, rtol=1e-10)


def test_the_order_does_not_matter() -> None:
    x, y = samples()
    found = []
    for order in (torch.arange(200), torch.argsort(y, stable=True), torch.argsort(-y, stable=True)):
        moments = Moments(5, scatter=True)
        for i, rows in enumerate(order.split(30)):
            moments.update(x[rows], y[rows], min(4, 1 + int(y[order[: 30 * (i + 1)]].max())))  # it grows
        found.append(moments)
    for other in found[1:]:
        for name, value in found[0].state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-12, atol=1e-10)


def test_a_common_offset_does_not_drown_the_scatter() -> None:
    """Sums of squares would lose ten of float32's digits here, and in float64 half of them."""
    x, y = samples(offset=1e4)
    moments = Moments(5, scatter=True)
    for rows in torch.arange(200).split(30):
        moments.update(x[rows], y[rows], 4)
    plain = Moments(5, scatter=True)
    plain.update(x.double() - 1e4, y, 4)
    torch.testing.assert_close(moments.covariance, plain.covariance, rtol=1e-9, atol=1e-9)


def test_a_class_without_samples_has_no_mean() -> None:
    moments = Moments(3)
    moments.update(torch.ones(4, 3), torch.tensor([0, 0, 2, 2]), 4)
    assert moments.counts.tolist() == [2, 0, 2, 0]
    assert moments.means.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]]
    moments.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 4)
    assert moments.counts.tolist() == [2, 0, 2, 0]


def test_state_round_trip_and_size() -> None:
    x, y = samples()
    a, b = Moments(5, scatter=True), Moments(5, scatter=True)
    a.update(x[:90], y[:90], 4)
    b.load_state_dict(a.state_dict())
    for moments in (a, b):
        moments.update(x[90:], y[90:], 4)
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert a.n_floats() == 4 + 4 * 5 + 5 * 5
    assert all(value.dtype == torch.float64 for value in a.state_dict().values())


def test_a_readout_is_linear_and_masks_what_it_does_not_know() -> None:
    readout = Readout(3)
    readout.grow(2)
    readout.grow(2)
    readout.set(torch.eye(3)[:2], torch.tensor([0.0, 10.0]), torch.tensor([True, True]))
    readout.grow(4)
    logits = readout(torch.tensor([[1.0, 2.0, 3.0]]))
    assert logits.tolist() == [[1, 12, MASKED, MASKED]]
    assert logits.dtype == torch.float32
    assert readout.n_floats() == 4 * 3 + 4
    assert set(readout.state_dict()) == {"weight", "bias", "known"}


def test_a_readout_keeps_its_precision_under_autocast() -> None:
    readout = Readout(64)
    readout.grow(2)
    torch.manual_seed(0)
    readout.set(1e3 * torch.randn(2, 64), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    x = torch.randn(5, 64)
    plain = readout(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(readout(x), plain)


def test_precise_is_double() -> None:
    assert precise(torch.zeros(1)).dtype == torch.float64
