"""(IA)³ (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"), through
PEFT's layers.

    keys, values and the inner activations of each block's feed-forward network times l_k, l_v, l_ff,   l = 1 at the start

The vectors have one dimension here (PEFT gives them two), so that like other scales they are not decayed: weight decay would
pull them to zero.
"""

from __future__ import annotations

from typing import Any

from peft import IA3Config, inject_adapter_in_model
from peft.tuners.ia3 import IA3Layer
from torch import nn

from clplatform.module import lora
from clplatform.tuning.base import Tuning, encoder
from clplatform.types import ClplatformError, InputSpec

NAME = "shared"
KEYS_AND_VALUES = {name for names in lora.PROJECTIONS for name in names[1:]}


class IA3(Tuning):
    """Scales of keys, values and feed-forward activations."""

    name = "ia3"
    mergeable = True

    def add(self, backbone: Any, spec: InputSpec) -> None:
        model = encoder(backbone)
        attention = [
            n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in KEYS_AND_VALUES
        ]
        if not attention:
            raise ClplatformError(
                f"tuning=ia3 finds no keys and values in {type(model).__name__}: choose another backbone, such as vit_b16 "
                "or minilm, or another tuning, such as bitfit"
            )
        names = {m: n for n, m in model.named_modules()}
        # The last linear layer of a block is the one that leaves its feed-forward network.
        linear = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in backbone.blocks()[1:]]
        inner = [names[of_block[-1]] for of_block in linear if of_block]  # a decoder's embeddings have none
        config = IA3Config(target_modules=_exactly([*attention, *inner]), feedforward_modules=_exactly(inner))
        inject_adapter_in_model(config, model, adapter_name=NAME)
        for layer in model.modules():
            if isinstance(layer, IA3Layer):
                layer.ia3_l[NAME] = nn.Parameter(layer.ia3_l[NAME].detach().flatten())


def _exactly(names: list[str]) -> str:
    """A pattern for these names of layers: PEFT takes a list as endings of names."""
    return "|".join(name.replace(".", r"\.") for name in names)
