"""Low-rank adapters (LoRA, Hu et al. 2022, Eq. 3), several on one backbone, through PEFT's layers.

    h = W x + (α/r) B_t A_t x

Every experience can have an adapter of its own, and the rows of one batch may go through different ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clplatform.types import ClplatformError

# The projections of attention (queries, keys, values), as architectures name them; GPT-2 has them in one.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("c_attn", "c_attn", "c_attn"),
)  # fmt: skip


def targets_of(backbone: nn.Module, roles: str = "qv") -> list[str]:
    """Full names of the layers to adapt: projections of attention, or else every linear layer.

    Args:
        roles: which of `q`, `k`, `v`; LoRA's authors adapt queries and values.
    """
    linear = linear_layers(backbone)
    for names in PROJECTIONS:
        chosen = [name for role, name in zip("qkv", names, strict=True) if role in roles]
        found = [name for name in linear if name.rpartition(".")[2] in chosen]
        if found:
            return found
    return linear


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers (GPT-2's are transposed ones) but a language model's output layer, whose weight may be that of
    the embeddings."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = [find(), getattr(model, "projection", None)]  # Hugging Face's, and that of a backbone of ours
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    return [n for n, m in linear if not any(m is o for o in output)]


def layers(backbone: nn.Module) -> list[LoraLayer]:
    """The adapted layers."""
    return list(named_layers(backbone).values())


def named_layers(backbone: nn.Module) -> dict[str, Any]:
    """The adapted layers by their names in the backbone."""
    return {name: m for name, m in backbone.named_modules() if isinstance(m, LoraLayer)}


def add_adapter(
    backbone: nn.Module, name: str, *, rank: int, alpha: float, dropout: float, targets: Sequence[str] | None = None,
    roles: str = "qv", dora: bool = False,
) -> None:  # fmt: skip
    """Add an adapter that changes nothing yet (B = 0); idempotent. What was trainable stays so.

    Args:
        name: of the adapter; without dots.
        targets: names of layers; None: `targets_of` these `roles`.
        dora: with lengths of their own for the rows of W (DoRA).

    Raises:
        ClplatformError: there is no layer to adapt.
    """
    # PEFT goes wrong on a module that merely contains a Hugging Face model.
    root: Any = next((m for m in backbone.modules() if hasattr(m, "base_model_prefix")), backbone)
    root = getattr(root, "base_model", root)  # of a language model that within its output layer
    adapted = layers(backbone)
    if adapted and name in adapted[0].r:
        return
    trainable = {id(p): p.requires_grad for p in backbone.parameters()}
    if adapted:
        chosen = [n for n, m in root.named_modules() if isinstance(m, LoraLayer)]
    else:
        chosen = list(targets) if targets is not None else targets_of(root, roles)
    if not chosen:
        raise ClplatformError(
            f"{type(root).__name__} has no linear layers that low-rank adapters could be put into: choose another backbone"
        )
    # A full match for each layer: PEFT takes a list as endings of names.
    pattern = "|".join(n.replace(".", r"\.") for n in chosen)
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_dora": dora}
    config = LoraConfig(**options, target_modules=pattern)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        warnings.filterwarnings(
            "ignore", message="fan_in_fan_out is set"
        )  # PEFT sees itself which layers are transposed
        inject_adapter_in_model(config, root, adapter_name=name)
    for p in backbone.parameters():  # PEFT freezes all but the new adapter
        p.requires_grad_(trainable.get(id(p), True))
    device = next(backbone.parameters()).device
    backbone.to(device).train(backbone.training)  # PEFT's dropout starts in training mode
    activate(backbone, None)


def activate(backbone: nn.Module, names: list[str] | None) -> None:
    """Let these adapters act, from now on; None or []: only the backbone itself. Trains or freezes nothing."""
    for layer in layers(backbone):
        layer._disable_adapters = not names
        layer._active_adapter = list(names or [])


def adapter_parameters(backbone: nn.Module, name: str) -> list[nn.Parameter]:
    """A and B of every adapted layer."""
    parts = ("lora_A", "lora_B")
    return [getattr(layer, part)[name].weight for layer in layers(backbone) for part in parts]


@torch.no_grad()
def renew(backbone: nn.Module, name: str, generator: torch.Generator) -> None:
    """Draw A anew, as `nn.Linear` and PEFT do, and set B = 0: the adapter changes nothing again."""
    for layer in named_layers(backbone).values():
        a = layer.lora_A[name].weight
        a.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape), a=5**0.5, generator=generator))
        layer.lora_B[name].weight.zero_()


@torch.no_grad()
def merge(backbone: nn.Module, name: str) -> None:
    """Move what the adapter does into the layers' own weights, W ← W + (α/r) B A (of DoRA, with rows of its lengths), and set
    B = 0."""
    for layer in named_layers(backbone).values():
        if layer.use_dora.get(name):
            layer.merge(adapter_names=[name])
            layer.merged_adapters.clear()  # it goes on acting: with B = 0 and lengths as of W's rows it changes nothing
            layer.lora_magnitude_vector[name].weight.abs_()
        else:
            weight = layer.get_base_layer().weight
            weight.add_(layer.get_delta_weight(name).to(weight.dtype))
        layer.lora_B[name].weight.zero_()


@contextmanager
def per_sample(backbone: nn.Module, adapter_of_row: Tensor, names: Sequence[str]) -> Iterator[None]:
    """Inside, row b of a batch goes through the adapter `names[adapter_of_row[b]]`, all in one pass.

    Args:
        adapter_of_row: int64 [B].
    """
    chosen = [names[int(i)] for i in adapter_of_row]
    activate(backbone, sorted(set(chosen)))

    def pass_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": chosen}

    hooks = [layer.register_forward_pre_hook(pass_names, with_kwargs=True) for layer in layers(backbone)]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        activate(backbone, None)


def n_parameters(backbone: nn.Module) -> int:
    """Parameters of all adapters."""
    names = {name for layer in layers(backbone) for name in layer.r}
    return sum(p.numel() for name in names for p in adapter_parameters(backbone, name))
