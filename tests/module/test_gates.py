"""Gates: where they act, and which weights the outputs of used units depend on, by trying every weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from encoders import IMAGE_MODELS, IMAGES, TEXT_MODELS, image_encoder, images, text_encoder
from torch import Tensor, nn
from world import DIM, TinyBackbone

from clplatform.backbone.mlp import MLP
from clplatform.module.gates import Gating
from clplatform.types import ClplatformError


def perceptron() -> MLP:
    torch.manual_seed(0)
    return MLP(input=IMAGES, name="mlp", hidden=[6, 5, 4], dropout=0.0, freeze="none").eval()


def batch_of(backbone: nn.Module, n: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if getattr(backbone, "reads", "") == "input_ids":
        return {"input_ids": torch.randint(1, 40, (n, 5)), "attention_mask": torch.ones(n, 5, dtype=torch.int64)}
    if isinstance(backbone, TinyBackbone):
        return {"pixel_values": torch.randn(n, 1, 1, DIM)}
    return {"pixel_values": images(n)}


def make(backbone: Any, n_units: int = 5) -> Gating:
    gating = Gating(backbone.eval(), n_units)
    for adapter in gating.adapters:
        nn.init.normal_(adapter.down.weight)
    return gating


TRANSFORMERS: dict[str, Callable[[], Any]] = {
    **{name: partial(image_encoder, name) for name in IMAGE_MODELS},
    **{name: partial(text_encoder, name) for name in TEXT_MODELS},
}
BACKBONES: dict[str, Callable[[], Any]] = {"mlp": perceptron, "tiny": TinyBackbone, **TRANSFORMERS}


@torch.no_grad()
def test_a_perceptron_s_units_are_multiplied_by_their_gates() -> None:
    mlp = perceptron()
    gates, gating = torch.rand(3, 15), make(mlp)
    assert gating.sizes == [6, 5, 4]
    assert len(gating.adapters) == 0
    with gating(gates):
        found = mlp(batch_of(mlp))
    x, weights = mlp.pixels(batch_of(mlp)["pixel_values"]).flatten(1), list(mlp.parameters())
    for layer, a in enumerate(gates.split([6, 5, 4], dim=1)):
        x = a * (x @ weights[2 * layer].T + weights[2 * layer + 1]).clamp_min(0)
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_a_transformer_gets_a_gated_adapter_after_each_block(name: str) -> None:
    backbone: Any = BACKBONES[name]()
    gating, batch = make(backbone), batch_of(backbone)
    blocks = backbone.blocks()[1:]
    assert gating.sizes == [5] * len(blocks)
    gates, outputs, hooks = torch.rand(3, sum(gating.sizes)), [], []

    def rewrite(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        adapter, i = gating.adapters[len(outputs)], len(outputs)
        a = gates[:, 5 * i : 5 * i + 5]
        z = x @ adapter.up.weight.T + adapter.up.bias
        gelu = z * (1 + torch.erf(z / 2**0.5)) / 2
        outputs.append(x + (a[:, None] * gelu) @ adapter.down.weight.T)
        return (outputs[-1], *output[1:]) if isinstance(output, tuple) else outputs[-1]

    hooks = [block.register_forward_hook(rewrite) for block in blocks]
    expected = backbone(batch)
    for hook in hooks:
        hook.remove()
    plain = backbone(batch)
    with gating(gates):
        found = backbone(batch)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain)
    assert torch.equal(backbone(batch), plain)  # outside, nothing is left


@torch.no_grad()
def test_a_new_adapter_changes_nothing() -> None:
    backbone = image_encoder()
    gating, batch = Gating(backbone, 5), batch_of(backbone)
    plain = backbone(batch)
    with gating(torch.rand(3, 15)):
        assert torch.equal(backbone(batch), plain)


def test_blocks_of_different_widths_are_refused() -> None:
    backbone: Any = image_encoder("swin", pooling="mean")
    gating = make(backbone)
    with gating(torch.rand(3, sum(gating.sizes))), pytest.raises(ClplatformError, match="differ in width"):
        backbone(batch_of(backbone))


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_used_units_depend_on_what_is_said_and_on_nothing_else(name: str) -> None:
    """Every single weight is changed: where the rest is said to be free, outputs through the used units stay, bit for bit;
    what is held is a weight between used ends."""
    backbone: Any = BACKBONES[name]()
    gating, batch = make(backbone), batch_of(backbone)
    used = torch.rand(sum(gating.sizes), generator=torch.Generator().manual_seed(2)) > 0.4
    gates = used.float().expand(3, -1)
    parameters = [*backbone.parameters(), *gating.adapters.parameters()]
    with gating(gates):
        before = backbone(batch)
    free = 0
    for p, where in gating.depends_on(used, parameters):
        old = p.detach().clone()
        p.masked_scatter_(~where, torch.randn(p.shape))
        with gating(gates):
            assert torch.equal(backbone(batch), before)
        free += int((~where).sum())
        p.copy_(old)
    assert free > 0


def test_the_places_are_the_paper_s_equation_by_loops() -> None:
    mlp = perceptron()
    gating = make(mlp)
    used = torch.rand(15, generator=torch.Generator().manual_seed(2)) > 0.4
    by_layer = [torch.ones(192), *used.float().split([6, 5, 4])]  # the inputs are always used
    found = {id(p): where for p, where in gating.depends_on(used, mlp.parameters())}
    weights = list(mlp.parameters())
    for layer in range(3):
        below, above = by_layer[layer], by_layer[layer + 1]
        for i in range(len(above)):
            assert found[id(weights[2 * layer + 1])][i] == (above[i] == 1)
            for j in range(len(below)):
                factor = 1 - min(above[i], below[j])
                assert found[id(weights[2 * layer])][i, j] == (factor == 0)
