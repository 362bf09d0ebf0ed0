"""Operations against the numbers that follow from the shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from clplatform.metric.flops import FlopMeter, measure


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16, bias=False), nn.Linear(16, 5, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.second(self.dropout(self.first(batch["pixel_values"].flatten(1)).relu()))


class Attention(nn.Module):
    """One head of width 4 over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(10, 4), nn.Linear(4, 4, bias=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.project(self.embed(batch["input_ids"]))
        return ((x @ x.transpose(1, 2)).softmax(-1) @ x).mean(1)


FORWARD = 2 * (12 * 16 + 16 * 5)
# With gradients of both weights, and of the second layer's input: the first layer's input needs none.
BOTH = FORWARD + 2 * (12 * 16 + 16 * 5) + 2 * 16 * 5


def images(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(n, 1, 3, 4)}


def test_a_sample_costs_its_matrix_products() -> None:
    assert measure(Perceptron(), (1, 3, 4), gradients=False) == FORWARD
    assert measure(Perceptron(), (1, 3, 4), gradients=True) == BOTH


def test_what_is_frozen_has_no_backward() -> None:
    model = Perceptron()
    model.first.requires_grad_(False)
    assert measure(model, (1, 3, 4), gradients=True) == FORWARD + 2 * 16 * 5
    assert measure(model.requires_grad_(False), (1, 3, 4), gradients=False) == FORWARD


def test_gradients_that_pass_through_a_frozen_model_cost_a_product_for_each_of_its_own() -> None:
    """As prompts get them: of a batch whose input, not its weights, has a gradient."""
    model = Perceptron().requires_grad_(False)
    meter = FlopMeter()
    meter.watch(model)
    x = images(3)
    x["pixel_values"].requires_grad_(True)
    model(x).sum().backward()
    assert meter.flush(model) == 3 * 2 * FORWARD


def test_measuring_changes_nothing() -> None:
    model = Perceptron().train()
    model.dropout.eval()
    before = torch.get_rng_state()
    measure(model, (1, 3, 4), gradients=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_passes_with_and_without_gradients_and_of_a_copy_add_up() -> None:
    model, meter = Perceptron(), FlopMeter()
    meter.watch(model)
    model(images(7))
    with torch.no_grad():
        model(images(3))
        copy.deepcopy(model)(images(2))
    assert meter.flush(model) == 7 * BOTH + 5 * FORWARD
    model(images(1))
    meter.drop()
    assert meter.flush(model) == 7 * BOTH + 5 * FORWARD


def test_per_sample_gradients_count_every_sample() -> None:
    model, meter = Perceptron().eval(), FlopMeter()
    meter.watch(model)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, ({"pixel_values": x[None]},)).sum()

    weights = {n: p.detach() for n, p in model.named_parameters()}
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images(6)["pixel_values"])
    assert meter.flush(model) == 6 * BOTH


@pytest.mark.parametrize("length", [1, 5, 33])
def test_text_grows_with_the_square_of_its_length(length: int) -> None:
    model, meter = Attention(), FlopMeter()
    meter.watch(model)
    with torch.no_grad():
        model({"input_ids": torch.zeros(3, length, dtype=torch.int64)})
    products = 4 * 4 * length + 2 * 4 * length**2
    assert meter.flush(model) == pytest.approx(3 * 2 * products)
