"""Prefix tuning (Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation"), trained directly in every layer
as in P-tuning v2 (Liu et al. 2022, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Across Scales and Tasks").

    softmax(Q [P_K; K]ᵀ / √d) [P_V; V],   P_K and P_V [L, D] in each layer

In Hugging Face's models attention is PyTorch's own (`sdpa`), whatever `backbone.attention` says, and has to see both ways. In ours
prefixes are in front of causal attention too, of decoders that write; attention to an encoder's output has none.
"""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge
from torch import nn

from clplatform.backbone.transformer.layers import DecoderLayer, EncoderLayer
from clplatform.module import lora
from clplatform.module.prompt import NAME, blocks, check_reach, prefixes, transformer, uniform
from clplatform.tuning.base import Tuning
from clplatform.types import ClplatformError, InputSpec

KEYS = {names[1] for names in lora.PROJECTIONS}


class Prefix(Tuning):
    """Keys and values in front of those of every layer.

    Args:
        length: L.
    """

    name = "prefix"

    def __init__(self, *, length: Annotated[int, Ge(1)]) -> None:
        self.length = length

    def add(self, backbone: Any, spec: InputSpec) -> None:
        own = [m.attention for m in backbone.modules() if isinstance(m, EncoderLayer | DecoderLayer)]
        for attention in own:  # of our Transformer, whose attention knows prefixes
            attention.prefix = self.keys_and_values(backbone)
        if not own:
            self._add_to_hugging_face(backbone, spec)

    def keys_and_values(self, backbone: Any) -> nn.ParameterList:
        """P_K and P_V of one layer."""
        return nn.ParameterList(uniform(self.length, backbone.feature_size) for _ in range(2))

    def _add_to_hugging_face(self, backbone: Any, spec: InputSpec) -> None:
        numbers = range(1, len(backbone.blocks()))
        check_reach(
            "tuning=prefix", backbone, spec, "prefixes", 2 * len(numbers),
            lambda p: prefixes(backbone, {i: (p[2 * i - 2], p[2 * i - 1]) for i in numbers}),
        )  # fmt: skip
        model = transformer(backbone)
        attentions = [m for block in blocks(backbone) for m in block.modules() if _makes_keys(m)]
        if len(attentions) != len(numbers):
            raise ClplatformError(
                f"tuning=prefix does not find the keys of every layer in {type(model).__name__}: choose another backbone, "
                "such as vit_b16 or minilm, or tuning=prompt"
            )
        for attention in attentions:
            attention.prefix = self.keys_and_values(backbone)
        model.config._attn_implementation = NAME


def _makes_keys(module: nn.Module) -> bool:
    return any(name in KEYS for name, _ in module.named_children())
