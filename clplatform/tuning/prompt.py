"""Prompt tuning (Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning"; Jia et al. 2022, "Visual Prompt
Tuning", in its shallow form): tokens that are learned, beside those of every sample.

    z = encoder([e_1; P; e_2; …; e_T]),   P [L, D] behind the first embedded token; its outputs are taken out again

See `clplatform.module.prompt`, whose prompts last as long as a context; these are part of the backbone and of its copies.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from clplatform.backbone.transformer.encoder import EncoderStack
from clplatform.backbone.transformer.layers import DecoderLayer
from clplatform.module.prompt import behind_first, check_reach, soft_prompts, transformer, uniform
from clplatform.tuning.base import Tuning
from clplatform.types import ClplatformError, InputSpec


class Prompt(Tuning):
    """Tokens behind the first.

    Args:
        length: L.
    """

    name = "prompt"

    def __init__(self, *, length: Annotated[int, Ge(1)]) -> None:
        self.length = length

    def add(self, backbone: Any, spec: InputSpec) -> None:
        if any(isinstance(m, EncoderStack | DecoderLayer) for m in backbone.modules()):
            self._add_to_ours(backbone)
            return
        check_reach(f"tuning={self.name}", backbone, spec, "soft prompts", 1, lambda p: soft_prompts(backbone, p[0]))
        model = transformer(backbone)
        # Hooks find the tokens by the module that they are called with: those of a copy of the backbone are the copy's.
        model.embeddings.soft_prompt = self.tokens(backbone.feature_size)
        model.register_forward_pre_hook(_extend, with_kwargs=True)
        model.embeddings.register_forward_hook(_insert)
        model.register_forward_hook(_remove)

    def _add_to_ours(self, backbone: Any) -> None:
        if any(isinstance(m, DecoderLayer) for m in backbone.modules()):
            raise ClplatformError(
                f"tuning={self.name} cannot give soft prompts to this backbone: its attention is causal; choose an encoder, such "
                "as transformer_text, or tuning=prefix"
            )
        stack = next(m for m in backbone.modules() if isinstance(m, EncoderStack))
        stack.soft_prompt = self.tokens(backbone.feature_size)
        stack.register_forward_pre_hook(_insert_into_stack)
        stack.register_forward_hook(_remove_from_stack)

    def tokens(self, size: int) -> nn.Parameter | nn.Module:
        """What is trained: the tokens [L, D], or a module that makes them."""
        return uniform(self.length, size)


def _extend(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The attention mask [B, T], if there is one, with ones for the prompts."""
    if (mask := kwargs.get("attention_mask")) is not None:
        n = len(model.embeddings.soft_prompt)
        kwargs = {**kwargs, "attention_mask": behind_first(mask, mask.new_ones(len(mask), n))}
    return args, kwargs


def made(prompt: nn.Parameter | nn.Module) -> Tensor:
    """The tokens [L, D]."""
    return prompt() if isinstance(prompt, nn.Module) else prompt


def _insert(embeddings: Any, args: Any, embedded: Tensor) -> Tensor:
    tokens = made(embeddings.soft_prompt)
    return behind_first(embedded, tokens.to(embedded).expand(len(embedded), -1, -1))


def _remove(model: Any, args: Any, output: Any) -> Any:
    output.last_hidden_state = _without(output.last_hidden_state, len(model.embeddings.soft_prompt))
    return output


def _without(hidden: Tensor, n: int) -> Tensor:
    return torch.cat([hidden[:, :1], hidden[:, 1 + n :]], 1)


# -- our own encoder --------------------------------------------------------------------------------------------------


def _insert_into_stack(stack: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """(x [B, T, D], mask [B, 1, 1, T], rotation): prompts are seen by all, and have no position to be turned by."""
    x, (mask, rotation) = args[0], (*args[1:], None, None)[:2]
    tokens = made(stack.soft_prompt).to(x)
    if mask is not None:
        mask = behind_first(mask.flatten(1), mask.new_ones(len(mask), len(tokens)))[:, None, None]
    if rotation is not None:
        cos, sin = (angle.squeeze(1) for angle in rotation)
        shape = (len(cos), len(tokens), cos.shape[-1])
        cos, sin = behind_first(cos, cos.new_ones(shape)), behind_first(sin, sin.new_zeros(shape))
        rotation = cos[:, None], sin[:, None]
    return behind_first(x, tokens.expand(len(x), -1, -1)), mask, rotation


def _remove_from_stack(stack: Any, args: Any, hidden: Tensor) -> Tensor:
    return _without(hidden, len(stack.soft_prompt))
