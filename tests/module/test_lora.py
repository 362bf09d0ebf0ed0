"""Adapters against PEFT's own model, their formula, and one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import image_encoder, images, text_encoder, texts
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel
from world import DIM, TinyBackbone

from clplatform.module import lora
from clplatform.types import ClplatformError

KINDS = ["bert", "distilbert", "vit"]


def encoder(kind: str, **changes: Any) -> tuple[Any, Any]:
    """A backbone of three layers with features [B, 16], and five samples for it."""
    if kind == "vit":
        return image_encoder(**changes), {"pixel_values": images(5)}
    return text_encoder(kind, **changes), texts((4, 12, 1, 7, 5))


def add(
    backbone: nn.Module, *names: str, seed: int | None = 3, rank: int = 2, alpha: float = 6.0, **options: Any
) -> None:
    """Adapters with weights as if they were trained (`seed` None: as they are made)."""
    for i, name in enumerate(names):
        lora.add_adapter(backbone, name, rank=rank, alpha=alpha, dropout=options.get("dropout", 0.0))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed + i)
            for p in lora.adapter_parameters(backbone, name):
                nn.init.normal_(p, std=0.3, generator=generator)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 asks for it
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_layers_are_those_of_peft_s_own_model(kind: str) -> None:
    backbone, batch = encoder(kind)
    plain = AutoModel.from_config(backbone.config, attn_implementation="sdpa")
    plain.load_state_dict(backbone.model.state_dict(), strict=False)
    names = [n for n, _ in plain.named_modules() if n.rpartition(".")[2] in lora_names(plain)]
    reference = get_peft_model(plain, LoraConfig(r=2, lora_alpha=6, target_modules=names)).eval()
    add(backbone, "a")
    own = {n.removeprefix("model."): t for n, t in backbone.state_dict().items() if "lora_" in n}
    theirs = {n: t for n, t in reference.state_dict().items() if "lora_" in n}
    renamed = {f"base_model.model.{n.replace('.a.', '.default.')}": t for n, t in own.items()}
    assert renamed.keys() == theirs.keys()
    assert len(own) == 3 * 2 * 2  # layers × (query, value) × (A, B)
    reference.load_state_dict(renamed, strict=False)
    backbone.model, adapted = reference, backbone.model
    expected = backbone(batch)
    backbone.model = adapted
    bare = backbone(batch)
    lora.activate(backbone, ["a"])
    torch.testing.assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bare, expected, atol=1e-2)


def lora_names(model: nn.Module) -> set[str]:
    """How this architecture names its query and value projections."""
    endings = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    found = [
        set(pair) for pair in (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin")) if set(pair) <= endings
    ]
    assert len(found) == 1
    return found[0]


@torch.no_grad()
def test_the_formula() -> None:
    """h = W x + b + (α/r) B A x, of one layer; two active adapters add up."""
    layer, x = TinyBackbone(), {"pixel_values": torch.randn(3, 1, 1, DIM)}
    add(layer, "a", "b", rank=2, alpha=6.0)
    base: Any = layer.layer
    weight, v = base.base_layer.weight, x["pixel_values"].flatten(1)
    change = {}
    for name in ("a", "b"):
        a, b = lora.adapter_parameters(layer, name)
        assert a.shape == (2, DIM) and b.shape == (16, 2)
        change[name] = 3.0 * v @ a.T @ b.T
    plain = v @ weight.T + base.base_layer.bias
    for names, expected in (([], plain), (["a"], plain + change["a"]), (["b"], plain + change["b"]),
                            (["a", "b"], plain + change["a"] + change["b"]), (None, plain)):  # fmt: skip
        lora.activate(layer, names)
        torch.testing.assert_close(layer(x), expected.tanh())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    backbone, batch = encoder(kind)
    before = backbone(batch)
    add(backbone, "a", seed=None)
    assert torch.equal(backbone(batch), before)
    lora.activate(backbone, ["a"])
    assert torch.equal(backbone(batch), before)  # B = 0
    a, b = lora.adapter_parameters(backbone, "a")[:2]
    assert a.any() and not b.any()
    add(backbone, "b")  # beside the first
    lora.activate(backbone, ["a"])
    assert torch.equal(backbone(batch), before)
    lora.activate(backbone, None)
    assert torch.equal(backbone(batch), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_goes_through_its_own_adapter(kind: str) -> None:
    backbone, batch = encoder(kind)
    names = ["a", "b", "c"]
    add(backbone, *names)
    choice = torch.tensor([2, 0, 1, 0, 2])
    with lora.per_sample(backbone, choice, names):
        together = backbone(batch)
    bare = backbone(batch)
    alone = []
    for i, c in enumerate(choice.tolist()):
        lora.activate(backbone, [names[c]])
        row = {n: t[i : i + 1] for n, t in batch.items()}
        alone.append(backbone(row))
        assert not torch.allclose(alone[-1], bare[i], atol=1e-2)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_per_sample_ends_where_it_began_even_at_an_error() -> None:
    backbone, batch = encoder("bert")
    add(backbone, "a", "b")
    before = backbone(batch)

    def fail() -> None:
        with lora.per_sample(backbone, torch.tensor([0, 1, 0, 1, 1]), ["a", "b"]):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert torch.equal(backbone(batch), before)
    assert torch.equal(backbone({n: t[:2] for n, t in batch.items()}), backbone({n: t[:2] for n, t in batch.items()}))


def test_gradients_reach_the_adapter_of_the_row_only() -> None:
    backbone, batch = encoder("bert")
    add(backbone, "a", "b", "c")
    with lora.per_sample(backbone, torch.tensor([0, 0, 2, 2, 0]), ["a", "b", "c"]):
        backbone(batch)[:2].square().sum().backward()  # rows 0 and 1

    def learns(name: str) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in lora.adapter_parameters(backbone, name))

    assert [learns(name) for name in ("a", "b", "c")] == [True, False, False]


@pytest.mark.parametrize("freeze", ["none", 1, "all"])
def test_what_was_trained_or_frozen_stays_so(freeze: Any) -> None:
    backbone, _ = encoder("bert", freeze=freeze)
    before = {n.replace(".base_layer", ""): p.requires_grad for n, p in backbone.named_parameters()}
    add(backbone, "a")
    first = {id(p) for p in lora.adapter_parameters(backbone, "a")}
    for p in lora.adapter_parameters(backbone, "a")[:2]:
        p.requires_grad_(False)  # as a strategy does when an experience is over
    add(backbone, "b")
    for name, p in backbone.named_parameters():
        if "lora_" not in name:
            assert p.requires_grad == before[name.replace(".base_layer", "")], name
    assert [p.requires_grad for p in lora.adapter_parameters(backbone, "a")[:3]] == [False, False, True]
    assert all(p.requires_grad for p in lora.adapter_parameters(backbone, "b"))
    assert {id(p) for p in lora.adapter_parameters(backbone, "a")} == first


def test_adding_an_adapter_again_changes_nothing() -> None:
    backbone, batch = encoder("bert")
    add(backbone, "a")
    state, count = torch.get_rng_state(), sum(1 for _ in backbone.modules())
    lora.activate(backbone, ["a"])
    before = backbone(batch)
    add(backbone, "a", seed=None, rank=5)
    assert torch.equal(state, torch.get_rng_state())
    assert count == sum(1 for _ in backbone.modules())
    assert torch.equal(backbone(batch), before)


@pytest.mark.parametrize(
    ("kind", "per_adapter"), [("bert", 3 * 2 * 2 * (16 + 16)), ("vit", 3 * 2 * 2 * (16 + 16)), ("tiny", 2 * (12 + 16))]
)
def test_parameters_are_rank_times_inputs_and_outputs(kind: str, per_adapter: int) -> None:
    backbone = TinyBackbone() if kind == "tiny" else encoder(kind)[0]
    before = sum(p.numel() for p in backbone.parameters())
    assert lora.n_parameters(backbone) == 0
    for n in (1, 2):
        add(backbone, f"adapter_{n}", rank=2)
        assert lora.n_parameters(backbone) == n * per_adapter
        assert sum(p.numel() for p in backbone.parameters()) == before + n * per_adapter


@torch.no_grad()
def test_only_the_named_layers_are_adapted() -> None:
    """A name is a whole one, not an ending, and its dots are dots."""
    backbone, _ = encoder("bert")
    chosen = ["encoder.layer.1.output.dense", "pooler.dense"]
    lora.add_adapter(backbone, "a", rank=2, alpha=4, dropout=0.0, targets=chosen[:1])
    assert [n for n, m in backbone.named_modules() if isinstance(m, lora.LoraLayer)] == [f"model.{chosen[0]}"]
    lora.add_adapter(backbone, "b", rank=2, alpha=4, dropout=0.0)  # a later one follows the first
    assert len(lora.adapter_parameters(backbone, "b")) == 2


@torch.no_grad()
def test_dropout_is_the_adapter_s_and_acts_in_training_only() -> None:
    backbone, batch = encoder("bert", dropout=0.0)
    add(backbone, "a", dropout=0.5)
    lora.activate(backbone, ["a"])
    assert torch.equal(backbone(batch), backbone(batch))
    backbone.train()
    assert not torch.equal(backbone(batch), backbone(batch))
    lora.activate(backbone, None)
    assert torch.equal(backbone(batch), backbone(batch))


@torch.no_grad()
def test_adapters_are_saved_with_the_backbone() -> None:
    backbone, batch = encoder("vit")
    add(backbone, "a", "b")
    again, _ = encoder("vit", seed=9)
    add(again, "a", "b", seed=None)
    again.load_state_dict(backbone.state_dict())
    choice = torch.tensor([0, 1, 0, 1, 1])
    found: list[Tensor] = []
    for model in (backbone, again):
        with lora.per_sample(model, choice, ["a", "b"]):
            found.append(model(batch))
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_the_weights_an_adapter_does_the_same(kind: str) -> None:
    backbone, batch = encoder(kind)
    bare = {n: t.clone() for n, t in backbone.state_dict().items()}
    add(backbone, "a", "b", rank=2, alpha=6.0)
    lora.activate(backbone, ["a"])
    expected = backbone(batch)
    lora.merge(backbone, "a")
    torch.testing.assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-5)
    lora.activate(backbone, None)
    torch.testing.assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-5)
    for name, layer in lora.named_layers(backbone).items():
        a, b = layer.lora_A["a"].weight, layer.lora_B["a"].weight
        assert a.any() and not b.any()
        assert layer.lora_B["b"].weight.any()
        change = layer.get_base_layer().weight - bare[f"{name}.weight"]
        assert torch.linalg.matrix_rank(change) == 2
    adapted = {f"{name}.base_layer.weight" for name in lora.named_layers(backbone)}
    for name, value in backbone.state_dict().items():
        if "lora_" not in name and name not in adapted:
            assert torch.equal(value, bare[name.replace(".base_layer", "")]), name


@torch.no_grad()
def test_a_renewed_adapter_is_a_new_one() -> None:
    backbone, batch = encoder("bert")
    before = backbone(batch)
    add(backbone, "a", "b", rank=8)
    old = [p.clone() for p in lora.adapter_parameters(backbone, "a")]
    lora.renew(backbone, "a", torch.Generator().manual_seed(5))
    lora.activate(backbone, ["a"])
    assert torch.equal(backbone(batch), before)
    new = lora.adapter_parameters(backbone, "a")
    for i, layer in enumerate(lora.layers(backbone)):
        a, b = new[2 * i], new[2 * i + 1]
        assert not torch.equal(a, old[2 * i])
        assert not b.any()
        bound = 1 / 16**0.5  # of nn.Linear with 16 inputs
        assert 0.9 * bound < a.abs().max() <= bound
        assert layer.lora_B["b"].weight.any()
    lora.renew(backbone, "b", torch.Generator().manual_seed(5))
    assert torch.equal(new[0], lora.adapter_parameters(backbone, "b")[0])  # by the generator


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_found_by_their_role(kind: str) -> None:
    backbone, _ = encoder(kind)
    found = {roles: lora.targets_of(backbone, roles) for roles in ("q", "k", "v", "qv", "kv")}
    assert [len(found[r]) for r in ("q", "k", "v", "qv", "kv")] == [3, 3, 3, 6, 6]
    assert {n.rpartition(".")[2][0] for n in found["k"]} == {"k"}
    assert set(found["k"] + found["v"]) == set(found["kv"])
    assert set(found["q"] + found["v"]) == set(found["qv"]) == set(lora.targets_of(backbone))
    lora.add_adapter(backbone, "a", rank=2, alpha=2, dropout=0.0, roles="kv")
    assert {n.rpartition(".")[2][0] for n in lora.named_layers(backbone)} == {"k", "v"}


def test_a_backbone_without_linear_layers_is_refused() -> None:
    with pytest.raises(ClplatformError, match="Sequential has no linear layers .*: choose another"):
        add(nn.Sequential(nn.Conv2d(1, 1, 1)), "a")
