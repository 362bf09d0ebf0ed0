"""The collapsed quadratic equals the sum over tasks that the papers write."""

from __future__ import annotations

import torch
from torch import nn

from clplatform.regularization.quadratic import Quadratic, fit, squared_distance


def naive(anchors: list[tuple[dict, dict]], module: nn.Module) -> torch.Tensor:
    named = dict(module.named_parameters())
    return sum(0.5 * (f[n] * (named[n] - a[n]) ** 2).sum() for f, a in anchors for n in f)  # type: ignore[return-value]


def tasks(module: nn.Module, n: int) -> list[tuple[dict, dict]]:
    g = torch.Generator().manual_seed(0)
    names = dict(module.named_parameters())
    return [
        (
            {k: torch.rand(p.shape, generator=g) * (torch.rand(p.shape, generator=g) > 0.3) for k, p in names.items()},
            {k: torch.randn(p.shape, generator=g) for k, p in names.items()},
        )
        for _ in range(n)
    ]


def test_equals_the_sum_over_tasks_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 4)
    anchors = tasks(module, 4)
    quadratic = Quadratic()
    for weight, anchor in anchors:
        quadratic.add(weight, anchor)
    ours, theirs = quadratic.penalty(module), naive(anchors, module)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, module.parameters()), torch.autograd.grad(theirs, module.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_what_is_there_decays_in_value_and_gradient() -> None:
    module = nn.Linear(5, 4)
    anchors, quadratic = tasks(module, 4), Quadratic()
    for weight, anchor in anchors:
        quadratic.add(weight, anchor, decay=0.5)
    faded = [({n: f * 0.5 ** (3 - i) for n, f in weight.items()}, a) for i, (weight, a) in enumerate(anchors)]
    ours, theirs = quadratic.penalty(module), naive(faded, module)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x, module.parameters()) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_half_is_there_and_the_anchor_is_free() -> None:
    module = nn.Linear(1, 1, bias=False)
    quadratic = Quadratic()
    quadratic.add({"weight": torch.tensor([[3.0]])}, {"weight": module.weight.detach() - 2})
    torch.testing.assert_close(quadratic.penalty(module).item(), 0.5 * 3 * 4.0)
    quadratic.replace({"weight": torch.tensor([[3.0]])}, {"weight": module.weight.detach().clone()})
    assert quadratic.penalty(module).item() == 0


def test_new_rows_of_a_grown_head_are_free() -> None:
    small = nn.Linear(3, 2)
    quadratic = Quadratic()
    quadratic.add(
        {n: torch.ones_like(p) for n, p in small.named_parameters()},
        {n: p.detach().clone() for n, p in small.named_parameters()},
    )
    grown = nn.Linear(3, 4)
    with torch.no_grad():
        grown.weight[:2], grown.bias[:2] = small.weight, small.bias
    penalty = quadratic.penalty(grown)
    assert penalty.item() == 0
    with torch.no_grad():
        grown.weight[0] += 1
        grown.weight[3] += 100
    torch.testing.assert_close(quadratic.penalty(grown).item(), 0.5 * 3)


def test_memory_does_not_grow_with_tasks() -> None:
    module = nn.Linear(5, 4)
    quadratic = Quadratic()
    for weight, anchor in tasks(module, 6):
        quadratic.add(weight, anchor)
    assert quadratic.cost() == {"extra_parameters": 2 * sum(p.numel() for p in module.parameters())}


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(2, 2)
    quadratic = Quadratic()
    quadratic.add(*tasks(module, 1)[0])
    module.bias.requires_grad_(False)
    gradients = torch.autograd.grad(quadratic.penalty(module), [module.weight])
    assert gradients[0].shape == module.weight.shape


def test_the_gradient_alone_is_added_to_what_is_there() -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 4)
    quadratic = Quadratic()
    quadratic.add_gradient(module, 3.0)  # nothing held, nothing added
    assert module.weight.grad is None
    quadratic.add(*tasks(module, 1)[0])
    expected = dict(
        zip("wb", torch.autograd.grad(3 * quadratic.penalty(module), [module.weight, module.bias]), strict=True)
    )
    module.weight.grad = torch.ones_like(module.weight)
    quadratic.add_gradient(module, 3.0)
    torch.testing.assert_close(module.weight.grad, 1 + expected["w"])
    torch.testing.assert_close(module.bias.grad, expected["b"])


def test_squared_distance_is_the_penalty_with_weight_one() -> None:
    torch.manual_seed(0)
    module, quadratic = nn.Linear(5, 6), Quadratic()
    anchor = {"weight": torch.randn(4, 5), "bias": torch.randn(4)}  # the module has grown since
    quadratic.add({n: torch.ones_like(a) for n, a in anchor.items()}, anchor)
    ours, theirs = squared_distance(module, anchor), quadratic.penalty(module)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, module.parameters()), torch.autograd.grad(theirs, module.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_fit_grows_and_cuts() -> None:
    t = torch.arange(4.0).view(2, 2)
    assert fit(t, torch.zeros(3, 2)).tolist() == [[0, 1], [2, 3], [0, 0]]
    assert fit(t, torch.zeros(1, 2)).tolist() == [[0, 1]]


def test_where_nothing_that_is_held_is_trained_the_penalty_is_zero() -> None:
    """As in a training stage of something else."""
    module, quadratic = nn.Linear(2, 2).requires_grad_(False), Quadratic()
    anchor = {"weight": torch.ones(2, 2)}
    quadratic.add({"weight": torch.ones(2, 2)}, anchor)
    quadratic.add_gradient(module, 1.0)
    assert quadratic.penalty(module).item() == squared_distance(module, anchor).item() == 0
