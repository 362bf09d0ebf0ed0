"""LoRA (Hu et al. 2022, Eq. 3): a low-rank change of some linear layers, through PEFT's layers.

h = W x + (α/r) B A x,   A [r, d_in] random, B [d_out, r] = 0
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from clplatform.module import lora
from clplatform.tuning.base import Tuning, encoder
from clplatform.types import InputSpec

NAME = "shared"  # of the adapter in PEFT's layers


class LoRA(Tuning):
    """Low-rank adapters.

    Args:
        rank, alpha, dropout: r, α, and the probability of dropout on what A reads.
        targets: projections of attention by their first letters (queries, keys, values), or `all` linear layers. A backbone
            without attention has all of them adapted.
    """

    name = "lora"
    mergeable = True
    dora: ClassVar[bool] = False

    def __init__(
        self,
        *,
        rank: Annotated[int, Ge(1)],
        alpha: Annotated[float, Gt(0)],
        dropout: Annotated[float, Ge(0), Lt(1)],
        targets: Literal["q", "v", "qv", "qkv", "all"],
    ) -> None:
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets

    def add(self, backbone: Any, spec: InputSpec) -> None:
        everywhere = lora.linear_layers(encoder(backbone))
        lora.add_adapter(
            backbone, NAME, rank=self.rank, alpha=self.alpha, dropout=self.dropout, dora=self.dora,
            roles=self.targets, targets=everywhere if self.targets == "all" else None,
        )  # fmt: skip
        lora.activate(backbone, [NAME])
