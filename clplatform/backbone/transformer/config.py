"""What a Transformer's layers are made of.

D  model size    N  heads    H = D / N  size of a head    F  inner size of the feed-forward network
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.types import ClplatformError

Activation = Literal["gelu", "gelu_new", "relu"]
Norm = Literal["pre", "post"]

# Hendrycks & Gimpel 2016: x Φ(x), and its approximation with tanh, which GPT-2 was trained with.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Settings that all layers of a stack share.

    Args:
        size: D.
        n_heads: N, a divisor of D.
        inner_size: F.
        activation: `gelu`, `gelu_new` (its approximation with tanh) or `relu`.
        norm: layer normalisation before each sub-layer (`pre`, Xiong et al. 2020) or after the residual sum (`post`,
            Vaswani et al. 2017; BERT and BART).
        dropout: of the output of every sub-layer, before it is added.
        attention_dropout: of the attention weights.
        activation_dropout: inside the feed-forward network.
        epsilon: of the layer normalisation.

    Raises:
        ClplatformError: the heads do not divide the size.
    """

    size: int
    n_heads: int
    inner_size: int
    activation: Activation = "gelu"
    norm: Norm = "pre"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.size % self.n_heads:
            raise ClplatformError(f"n_heads={self.n_heads} does not divide size={self.size}; give a divisor of it")

    @property
    def head_size(self) -> int:
        return self.size // self.n_heads


def initialise(model: nn.Module, n_layers: int) -> None:
    """Draw new weights: normal with σ = √(2 / 5D) (SmallInit, Nguyen & Salazar 2019, "Transformers without Tears", § 2.2), biases
    0, and what is added to the residual stream scaled by 1/√(2 · layers), so that its variance does not grow with depth
    (GPT-2, Radford et al. 2019, § 2.3).

    GPT-2's own σ = 0.02 is this σ for D = 1000. In small models it is far too little: with D = 64 an encoder-decoder that should
    learn in minutes does not begin to look at its source.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            size = module.in_features if isinstance(module, nn.Linear) else module.embedding_dim
            std = math.sqrt(2 / (5 * size))
            added = name.endswith(("out_proj", "contract"))
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * n_layers) if added else std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
