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

from clplatform.module.prompt import behind_first, check_reach, soft_prompts, transformer, uniform
from clplatform.tuning.base import Tuning
from clplatform.types import InputSpec


class Prompt(Tuning):
    """Tokens behind the first.

    Args:
        length: L.
    """

    name = "prompt"

    def __init__(self, *, length: Annotated[int, Ge(1)]) -> None:
        self.length = length

    def add(self, backbone: Any, spec: InputSpec) -> None:
        check_reach(f"tuning={self.name}", backbone, spec, "soft prompts", 1, lambda p: soft_prompts(backbone, p[0]))
        model = transformer(backbone)
        # Hooks find the tokens by the module that they are called with: those of a copy of the backbone are the copy's.
        model.embeddings.soft_prompt = self.tokens(backbone.feature_size)
        model.register_forward_pre_hook(_extend, with_kwargs=True)
        model.embeddings.register_forward_hook(_insert)
        model.register_forward_hook(_remove)

    def tokens(self, size: int) -> nn.Parameter | nn.Module:
        """What is trained: the tokens [L, D], or a module that makes them."""
        return uniform(self.length, size)


def _extend(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The attention mask [B, T], if there is one, with ones for the prompts."""
    if (mask := kwargs.get("attention_mask")) is not None:
        n = len(model.embeddings.soft_prompt)
        kwargs = {**kwargs, "attention_mask": behind_first(mask, mask.new_ones(len(mask), n))}
    return args, kwargs


def _insert(embeddings: Any, args: Any, embedded: Tensor) -> Tensor:
    prompt = embeddings.soft_prompt
    tokens = prompt() if isinstance(prompt, nn.Module) else prompt
    return behind_first(embedded, tokens.to(embedded).expand(len(embedded), -1, -1))


def _remove(model: Any, args: Any, output: Any) -> Any:
    hidden = output.last_hidden_state
    output.last_hidden_state = torch.cat([hidden[:, :1], hidden[:, 1 + len(model.embeddings.soft_prompt) :]], 1)
    return output
