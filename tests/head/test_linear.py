"""A linear head grows by rows; what it has learned stays, to the bit."""

from __future__ import annotations

import pytest
import torch
from heads import GROWING, filled, grown, info
from torch import nn

from clplatform.head.linear import LinearHead, grown_linear


@torch.no_grad()
def test_logits_are_those_of_a_linear_layer() -> None:
    head, x = grown(LinearHead(feature_size=5), 3), torch.randn(4, 5)
    assert head.linear is not None
    expected = x @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x, torch.tensor([0, 1, 0, 5])), expected)  # whatever the task


@torch.no_grad()
@pytest.mark.parametrize("kind", GROWING)
def test_old_classes_keep_their_weights_and_logits(kind: str) -> None:
    head = filled(GROWING[kind](5), 3)
    x, before = torch.randn(6, 5), {n: t.clone() for n, t in head.state_dict().items()}
    old = head(x, torch.zeros(6, dtype=torch.int64))
    head.grow(info(1, (3, 4), 5))
    for name, tensor in before.items():
        grown_tensor = head.state_dict()[name]
        assert torch.equal(grown_tensor[: len(tensor)] if tensor.ndim else grown_tensor, tensor)
        if tensor.ndim:
            assert len(grown_tensor) == 5
            assert grown_tensor[3:].any()
    # Equal but for rounding: the matrix product has got wider.
    torch.testing.assert_close(head(x, torch.zeros(6, dtype=torch.int64))[:, :3], old)


@torch.no_grad()
@pytest.mark.parametrize("kind", GROWING)
def test_growing_again_to_what_is_there_changes_nothing(kind: str) -> None:
    head = GROWING[kind](5)
    experiences = [info(0, (0, 1), 2), info(1, (2, 3, 4), 5)]
    for experience in experiences:
        head.grow(experience)
    parameters = dict(head.named_parameters())
    values = {n: t.clone() for n, t in head.state_dict().items()}
    state = torch.get_rng_state()
    for experience in (experiences[1], experiences[0], experiences[1]):
        head.grow(experience)
    assert all(p is parameters[n] for n, p in head.named_parameters())
    assert all(torch.equal(t, values[n]) for n, t in head.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", GROWING)
def test_growth_keeps_device_precision_and_freezing(kind: str) -> None:
    head = grown(GROWING[kind](5), 2).to(torch.bfloat16).requires_grad_(False)
    head.grow(info(1, (2,), 3))
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in head.parameters())
    meta = grown(GROWING[kind](5), 2).to("meta")
    meta.grow(info(1, (2,), 3))
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_new_rows_are_drawn_as_pytorch_draws_them() -> None:
    torch.manual_seed(0)
    new = grown_linear(nn.Linear(64, 2), 64, 2000)
    bound = 1 / 64**0.5  # nn.Linear's, uniform
    for rows in (new.weight[2:], new.bias[2:]):
        assert rows.abs().max() <= bound
        assert rows.detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(rows.detach().mean().item()) < bound / 20


def test_without_classes_there_are_no_logits() -> None:
    with pytest.raises(AssertionError, match="grow"):
        LinearHead(feature_size=5)(torch.randn(1, 5), torch.zeros(1, dtype=torch.int64))
