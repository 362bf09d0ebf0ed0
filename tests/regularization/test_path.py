"""The optimizer's path: what is added up, and what is not."""

from __future__ import annotations

import torch
from torch import nn

from clplatform.regularization.path import Path


def test_gradient_times_step_and_the_way_gone() -> None:
    torch.manual_seed(0)
    module, path = nn.Linear(3, 2), Path()
    change, moved = torch.zeros(2, 3), torch.zeros(2, 3)
    for _ in range(3):
        gradient, step = torch.randn(2, 3), torch.randn(2, 3)
        module.weight.grad = gradient.clone()
        path.before_step(module)
        module.weight.grad += 100  # a penalty's gradient, clipping, …
        with torch.no_grad():
            module.weight += step
        path.after_step(module)
        change -= gradient * step
        moved += step
    torch.testing.assert_close(path.change, {"weight": change})  # the bias has no gradient
    torch.testing.assert_close(path.moved, {"weight": moved})


def test_a_step_that_was_skipped_is_forgotten() -> None:
    module, path = nn.Linear(1, 1, bias=False), Path()
    module.weight.grad = torch.tensor([[float("inf")]])
    path.before_step(module)  # a scaler finds it is not finite, and no step is taken
    module.weight.grad = torch.tensor([[2.0]])
    path.before_step(module)
    with torch.no_grad():
        module.weight -= 3
    path.after_step(module)
    assert path.change["weight"].item() == 6
    path.after_step(module)  # nothing new
    assert path.change["weight"].item() == 6


def test_goes_on_from_its_state_and_says_what_it_holds() -> None:
    module, path, other = nn.Linear(3, 2), Path(), Path()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    path.before_step(module)
    with torch.no_grad():
        module.weight += 1
    path.after_step(module)
    assert path.n_floats() == 4 * 8  # two sums, and room for the gradient and the weight before a step
    other.load_state_dict(path.state_dict())
    torch.testing.assert_close(other.change, path.change)
    torch.testing.assert_close(other.moved, path.moved)
    path.clear()
    assert path.n_floats() == 0
    assert other.n_floats() == 2 * 8
