"""Bottleneck adapters (Houlsby et al. 2019), one after each block with a layer norm of its own, as Bapna & Firat 2019 place it.

h ← h + U relu(D norm(h)),   U = 0 at the start
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge

from clplatform.module import adapter
from clplatform.module.mode import eval_mode
from clplatform.module.prompt import one_sample
from clplatform.tuning.base import Tuning
from clplatform.types import ClplatformError, InputSpec


class Adapter(Tuning):
    """An adapter after each block.

    Args:
        bottleneck: rows of D.
    """

    name = "adapter"

    def __init__(self, *, bottleneck: Annotated[int, Ge(1)]) -> None:
        self.bottleneck = bottleneck

    def add(self, backbone: Any, spec: InputSpec) -> None:
        adapter.add_adapter(backbone, 0, bottleneck=self.bottleneck)
        if not adapter.banks(backbone):
            raise ClplatformError(
                "tuning=adapter finds no blocks in this backbone: choose a Transformer, such as vit_b16 or minilm"
            )
        adapter.activate(backbone, 0)
        with eval_mode(backbone), torch.no_grad():  # blocks of different sizes are refused now
            backbone(one_sample(spec, next(backbone.parameters()).device))
