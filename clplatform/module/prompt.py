"""Prompts for a frozen Hugging Face encoder: soft tokens at its input, prefixes of its attention.

    soft prompts   z = encoder([e_1; P; e_2; …; e_T]),  P [B, L, D] behind the first embedded token
    prefixes       softmax(Q [P_K; K]ᵀ / √d) [P_V; V],  P_K and P_V [B, L, D]  (Li & Liang 2021)

Both hold while a context lasts and leave nothing behind in the model, which may be copied and saved at any time; every row
of a batch may have prompts of its own. A soft prompt is put in behind the embeddings, where tokens have their positions
already: prompts have none, the text or image keeps its own, and a model of absolute positions cannot tell where among
the tokens a prompt is. Their outputs are taken out again, so that whatever pools the tokens sees those of the sample only.
Prefixes are keys and values as the layer's projections would give them; relative positions (BEiT's) say nothing about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from clplatform.memory.features import FrozenFeatures
from clplatform.module.rates import all_at_rate
from clplatform.types import Batch, ClplatformError, Data, InputSpec, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

KeysAndValues = tuple[Tensor, Tensor]

# What a model raises at tokens or rows of attention that it does not expect.
REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)


def uniform(*shape: int, low: float = 0.0, high: float = 0.01) -> nn.Parameter:
    """A new parameter; prompts start small, as those of L2P's and DualPrompt's authors do."""
    return nn.Parameter(torch.empty(shape).uniform_(low, high))


# -- soft prompts -----------------------------------------------------------------------------------------------------


@contextmanager
def soft_prompts(backbone: nn.Module, prompts: Tensor) -> Iterator[list[Tensor]]:
    """Inside, the backbone reads these tokens too.

    Args:
        prompts: [B, L, D], or [L, D] for all rows.

    Yields:
        A list that receives what the prompts have become, [B, L, D], at each pass.
    """
    model, n, outputs = transformer(backbone), prompts.shape[-2], []

    def extend(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs = {**kwargs, "attention_mask": behind_first(mask, mask.new_ones(len(mask), n))}
        return args, kwargs

    def insert(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return behind_first(embedded, prompts.to(embedded).expand(len(embedded), -1, -1))

    def remove(module: nn.Module, args: Any, output: Any) -> Any:
        first, found, rest = output.last_hidden_state.tensor_split((1, 1 + n), dim=1)
        outputs.append(found)
        output.last_hidden_state = torch.cat([first, rest], 1)
        return output

    hooks = [
        model.register_forward_pre_hook(extend, with_kwargs=True),
        model.embeddings.register_forward_hook(insert),
        model.register_forward_hook(remove),
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def behind_first(tokens: Tensor, more: Tensor) -> Tensor:
    """[B, T, …] and [B, L, …] → [B, 1 + L + T − 1, …]."""
    return torch.cat([tokens[:, :1], more, tokens[:, 1:]], 1)


def transformer(backbone: nn.Module) -> Any:
    """The Hugging Face model inside a backbone, without a language model's output layer."""
    found: Any = next(m for m in backbone.modules() if hasattr(m, "base_model_prefix"))
    return found.base_model


# -- prefixes ---------------------------------------------------------------------------------------------------------

NAME = "clplatform_prefix"
_prefixes: dict[nn.Module, list[KeysAndValues]] = {}  # while `prefixes` lasts: those of an attention module


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """PyTorch's attention, with the module's prefixes: its own (`module.prefix`, of a tuned backbone) and those of contexts.
    Keys and values [B, heads, T, d], mask [B or 1, 1, T or 1, T]."""
    own = [module.prefix] if hasattr(module, "prefix") else []
    for keys, values in [*own, *_prefixes.get(module, ())]:
        key, value = _in_front(keys, key), _in_front(values, value)
    if attention_mask is not None and (n := key.shape[2] - attention_mask.shape[3]):
        seen = attention_mask.new_ones if attention_mask.dtype == torch.bool else attention_mask.new_zeros
        attention_mask = torch.cat([seen(*attention_mask.shape[:3], n), attention_mask], 3)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[arg-type]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _in_front(prefix: Tensor, x: Tensor) -> Tensor:
    """[B, L, D] or [L, D] in front of [B, heads, T, d]."""
    heads = prefix.to(x).expand(len(x), -1, -1).unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)
    return torch.cat([heads, x], 2)


@contextmanager
def prefixes(backbone: nn.Module, by_layer: Mapping[int, KeysAndValues]) -> Iterator[None]:
    """Inside, every token attends to these keys and values too, and to those of a context around this one. Attention is
    PyTorch's own (`sdpa`) for as long.

    Args:
        by_layer: number of a layer, from 1 → keys and values, each [B, L, D], or [L, D] for all rows.
    """
    config, layers = transformer(backbone).config, blocks(backbone)
    own = {module: kv for number, kv in by_layer.items() for module in layers[number - 1].modules()}
    implementation, config._attn_implementation = config._attn_implementation, NAME
    before = dict(_prefixes)
    _prefixes.update({module: [*before.get(module, ()), kv] for module, kv in own.items()})
    try:
        yield
    finally:
        config._attn_implementation = implementation
        _prefixes.clear()
        _prefixes.update(before)


def blocks(backbone: Any) -> list[nn.Module]:
    """The Transformer's layers."""
    return backbone.blocks()[1:]


# -- what fits --------------------------------------------------------------------------------------------------------


def check_soft_prompts(name: str, backbone: Any, spec: InputSpec) -> None:
    """Raises ClplatformError where soft prompts do not reach the features; `name` is the strategy's."""
    check_reach(f"strategy={name}", backbone, spec, "soft prompts", 1, lambda p: soft_prompts(backbone, p[0]))


def check_prefixes(name: str, backbone: Any, spec: InputSpec, layers: list[int], setting: str) -> None:
    """Raises ClplatformError where the backbone has no such layers, or prefixes do not reach the features.

    Args:
        name: the strategy's.
        layers: numbers of layers, from 1.
        setting: where they are from.
    """
    n = len(blocks(backbone))
    if max(layers) > n:
        raise ClplatformError(
            f"strategy.{name}.{setting}={layers}: the backbone has {n} layers; give numbers from 1 to {n}"
        )
    for layer in layers:
        check_reach(
            f"strategy={name}", backbone, spec, "prefixes", 2,
            lambda p, at=layer: prefixes(backbone, {at: (p[0], p[1])}),
        )  # fmt: skip


def check_reach(
    who: str,
    backbone: Any,
    spec: InputSpec,
    what: str,
    n: int,
    inside: Callable[[Tensor], AbstractContextManager[Any]],
) -> None:
    """Pass a sample through with n prompts of one row, each of which must get a gradient: ClplatformError if not.

    Args:
        who: as it is typed (`strategy=l2p`).
        what: is given to the backbone.
        inside: prompts [n, 1, D] → the context in which the backbone has them.
    """
    model = next((m for m in backbone.modules() if hasattr(m, "base_model_prefix")), None)
    refused = f"{who} cannot give {what} to this backbone"
    if model is None:
        raise ClplatformError(f"{refused}: it is no Hugging Face Transformer; choose one, such as vit_b16 or minilm")
    if spec.max_target_length is not None or any(getattr(m, "is_causal", False) for m in model.modules()):
        raise ClplatformError(f"{refused}: its attention is causal; choose an encoder, such as distilbert")
    device, mode = next(backbone.parameters()).device, backbone.training
    batch = one_sample(spec, device)
    prompts = torch.linspace(-1, 1, n * backbone.feature_size, device=device).view(n, 1, -1).requires_grad_()
    backbone.eval()
    try:
        with torch.enable_grad(), inside(prompts):
            features = backbone.forward(batch)  # past the counter of operations
            (gradient,) = torch.autograd.grad(
                features.square().sum() + features.flatten()[0], prompts, allow_unused=True
            )
    except REFUSALS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ClplatformError(f"{refused}: {type(model).__name__} does not take them ({reason})") from error
    finally:
        backbone.train(mode)
    if gradient is None or not gradient.flatten(1).any(1).all():
        raise ClplatformError(f"{refused}: they do not reach its features; choose another, such as vit_b16 or minilm")


def one_sample(spec: InputSpec, device: torch.device) -> Batch:
    """A batch of one sample of zeros."""
    if spec.modality == "image":
        assert spec.shape is not None
        return {"pixel_values": torch.zeros(1, *spec.shape, device=device)}
    ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
    written = {} if spec.max_target_length is None else {"decoder_input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **written}


# -- what prompt strategies share -------------------------------------------------------------------------------------


class Queries:
    """Features of the bare, frozen backbone, by which prompts are chosen: those of a stage's data are computed once, unless
    they are augmented."""

    def __init__(self) -> None:
        self.features = FrozenFeatures()

    def prepare(self, learner: Learner, data: Data) -> None:
        """Training on `data` begins."""
        if learner.augmentation is None:
            self.features.prepare(data)

    def clear(self) -> None:
        self.features.clear()

    @torch.no_grad()
    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """[B, D], in eval mode; the backbone stays in the mode in which it was."""
        mode = learner.backbone.training
        learner.backbone.eval()
        cached = learner.training and learner.augmentation is None
        found = self.features(learner, batch) if cached else learner.frozen_features(batch)
        learner.backbone.train(mode)
        return found


def task_loss(learner: Learner, batch: Batch, output: Output, *, mask: bool) -> Tensor:
    """The task's loss; with `mask` among the classes of the experience, as if there were no others."""
    if not mask:
        return learner.task_loss(batch, output)
    assert learner.experience is not None
    classes = torch.tensor(learner.experience.classes, device=batch["labels"].device)
    own = {**batch, "labels": torch.searchsorted(classes, batch["labels"])}
    return learner.task_loss(own, Output(output.logits[:, classes], output.features))


def without_decay(groups: list[dict[str, Any]], lr: float | None) -> list[dict[str, Any]]:
    """The optimizer's parameter groups without weight decay, which would wear away what gets no gradient (prompts that are
    not chosen, classifiers of old classes); at this learning rate, unless it is None."""
    return [{**g, "weight_decay": 0.0} for g in all_at_rate(groups, lr)]


def size_of(module: nn.Module) -> int:
    """Numbers that a module holds: parameters and buffers of floats."""
    return sum(t.numel() for t in module.state_dict().values() if t.is_floating_point())


def cosine(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, D] and [M, D] → cosines [B, M], in float32."""
    return F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T
