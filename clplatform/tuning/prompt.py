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
        check_reach("tuning=prompt", backbone, spec, "soft prompts", 1, lambda p: soft_prompts(backbone, p[0]))
        model = transformer(backbone)
        # Hooks find the tokens by the module that they are called with: those of a copy of the backbone are the copy's.
        model.embeddings.soft_prompt = uniform(self.length, backbone.feature_size)
        model.register_forward_pre_hook(_extend, with_kwargs=True)
        model.embeddings.register_forward_hook(_insert)
        model.register_forward_hook(_remove)


def _extend(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The attention mask [B, T], if there is one, with ones for the prompts."""
    if (mask := kwargs.get("attention_mask")) is not None:
        kwargs = {**kwargs, "attention_mask": behind_first(mask, mask.new_ones(len(mask), _length(model)))}
    return args, kwargs


def _insert(embeddings: Any, args: Any, embedded: Tensor) -> Tensor:
    return behind_first(embedded, embeddings.soft_prompt.to(embedded).expand(len(embedded), -1, -1))


def _remove(model: nn.Module, args: Any, output: Any) -> Any:
    hidden = output.last_hidden_state
    output.last_hidden_state = torch.cat([hidden[:, :1], hidden[:, 1 + _length(model) :]], 1)
    return output


def _length(model: Any) -> int:
    return model.embeddings.soft_prompt.shape[0]
