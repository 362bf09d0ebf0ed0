"""Bottleneck adapters against their formula and one row at a time, in encoders of every kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from encoders import image_encoder, images, text_encoder, texts
from torch import Tensor, nn

from clplatform.module import adapter
from clplatform.types import ClplatformError

KINDS = ["vit", "deit", "dinov2_with_registers", "bert", "roberta", "distilbert", "modernbert", "gpt2"]


def encoder(kind: str, **changes: Any) -> tuple[Any, Any]:
    """A backbone of three layers with features [B, 16], and five samples for it."""
    if kind in ("vit", "deit", "dinov2_with_registers", "swin"):
        return image_encoder(kind, **changes), {"pixel_values": images(5)}
    return text_encoder(kind, **changes), texts((4, 12, 1, 7, 5))


def add(backbone: Any, n: int, *, seed: int = 3) -> None:
    """Adapters with weights as if they were trained."""
    for i in range(n):
        adapter.add_adapter(backbone, i, bottleneck=5)
        generator = torch.Generator().manual_seed(seed + i)
        for p in adapter.adapter_parameters(backbone, i):
            nn.init.normal_(p, std=0.4, generator=generator)


def by_hand(weights: list[Tensor], h: Tensor) -> Tensor:
    """h + U relu(D (γ (h − mean)/std + β)), one position at a time."""
    gain, bias, down, up = weights
    rows = []
    for x in h.flatten(0, -2):
        normal = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        rows.append(x + up @ (down @ (gain * normal + bias)).clamp_min(0))
    return torch.stack(rows).view_as(h)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_s_output_goes_through_the_formula(kind: str) -> None:
    """Each block's input is what the formula makes of the output of the block before."""
    backbone, batch = encoder(kind)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for block in backbone.blocks()[1:]:  # registered before the adapters' hooks: the block's own output
        block.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        block.register_forward_hook(lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    add(backbone, 2)
    for number in (0, 1):
        inputs.clear(), outputs.clear()
        adapter.activate(backbone, number)
        backbone(batch)
        assert len(inputs) == len(outputs) == 3
        assert len(adapter.banks(backbone)) == 3
        for i, bank in enumerate(adapter.banks(backbone)[:2]):
            expected = by_hand(list(bank[number].parameters()), outputs[i])
            torch.testing.assert_close(inputs[i + 1], expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(inputs[i + 1], outputs[i], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_last_block_is_adapted_too(kind: str) -> None:
    backbone, batch = encoder(kind)
    add(backbone, 1)
    bare = backbone(batch)
    for p in [p for bank in adapter.banks(backbone)[:2] for p in bank.parameters()]:
        p.zero_()
    adapter.activate(backbone, 0)
    assert not torch.allclose(backbone(batch), bare, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    backbone, batch = encoder(kind)
    before = backbone(batch)
    adapter.add_adapter(backbone, 0, bottleneck=5)
    assert torch.equal(backbone(batch), before)
    adapter.activate(backbone, 0)
    assert torch.equal(backbone(batch), before)  # U = 0
    add(backbone, 2)
    adapter.activate(backbone, 1)
    assert not torch.allclose(backbone(batch), before, atol=1e-2)
    adapter.activate(backbone, None)
    assert torch.equal(backbone(batch), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_goes_through_its_own_adapter(kind: str) -> None:
    backbone, batch = encoder(kind)
    add(backbone, 4)
    choice = torch.tensor([3, 0, 1, 0, 3])  # 2 is not asked
    with adapter.per_sample(backbone, choice):
        together = backbone(batch)
    alone = []
    for i, c in enumerate(choice.tolist()):
        with adapter.per_sample(backbone, torch.tensor([c])):
            alone.append(backbone({n: t[i : i + 1] for n, t in batch.items()}))
        adapter.activate(backbone, c)
        assert torch.equal(alone[-1], backbone({n: t[i : i + 1] for n, t in batch.items()}))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_per_sample_ends_where_it_began_even_at_an_error() -> None:
    backbone, batch = encoder("bert")
    add(backbone, 2)
    before = backbone(batch)

    def fail() -> None:
        with adapter.per_sample(backbone, torch.tensor([0, 1, 0, 1, 1])):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert torch.equal(backbone(batch), before)


def test_gradients_reach_the_adapter_of_the_row_only() -> None:
    backbone, batch = encoder("bert")
    add(backbone, 3)
    with adapter.per_sample(backbone, torch.tensor([0, 0, 2, 2, 0])):
        backbone(batch)[:2].square().sum().backward()  # rows 0 and 1

    def learns(number: int) -> list[bool]:
        return [p.grad is not None and bool(p.grad.any()) for p in adapter.adapter_parameters(backbone, number)]

    assert [set(learns(n)) for n in range(3)] == [{True}, {False}, {False}]


def test_adding_an_adapter_again_changes_nothing_and_what_was_trained_or_frozen_stays_so() -> None:
    backbone, batch = encoder("vit", freeze=1)
    before = {n: p.requires_grad for n, p in backbone.named_parameters()}
    assert set(before.values()) == {True, False}
    add(backbone, 2)
    for p in adapter.adapter_parameters(backbone, 0):
        p.requires_grad_(False)
    state, found = torch.get_rng_state(), backbone(batch)
    adapter.add_adapter(backbone, 0, bottleneck=5)
    adapter.add_adapter(backbone, 1, bottleneck=5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found, backbone(batch))
    after = {n: p.requires_grad for n, p in backbone.named_parameters() if ".adapters." not in n}
    assert after == before
    assert not any(p.requires_grad for p in adapter.adapter_parameters(backbone, 0))
    assert all(p.requires_grad for p in adapter.adapter_parameters(backbone, 1))
    per_adapter = 3 * (2 * 16 + 2 * 5 * 16)
    assert adapter.n_parameters(backbone) == 2 * per_adapter
    assert sum(p.numel() for n, p in backbone.named_parameters() if ".adapters." in n) == 2 * per_adapter


@torch.no_grad()
def test_adapters_are_copied_and_saved_with_the_backbone() -> None:
    backbone, batch = encoder("vit")
    add(backbone, 2)
    adapter.activate(backbone, 0)
    first = backbone(batch)
    twin = copy.deepcopy(backbone)
    for p in adapter.adapter_parameters(backbone, 0):
        p.zero_()
    adapter.activate(backbone, None)
    assert torch.equal(twin(batch), first)  # its own weights and its own choice
    again, _ = encoder("vit", seed=9)
    add(again, 2, seed=5)
    again.load_state_dict(twin.state_dict())
    adapter.activate(again, 0)
    assert torch.equal(again(batch), first)


def test_blocks_of_several_sizes_are_refused() -> None:
    backbone, batch = encoder("swin", pooling="mean")
    add(backbone, 1)
    with pytest.raises(ClplatformError, match="adapters need a backbone all of whose blocks have features of one size"):
        backbone(batch)
