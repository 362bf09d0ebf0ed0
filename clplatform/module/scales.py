"""(IA)³'s scales (Liu et al. 2022) in PEFT's layers, and how they become a part of the weights."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.ia3 import IA3Layer
from torch import nn


def layers(backbone: nn.Module) -> list[Any]:
    """The scaled layers."""
    return [m for m in backbone.modules() if isinstance(m, IA3Layer)]


@torch.no_grad()
def merge(backbone: nn.Module) -> None:
    """W ← diag(l) W and b ← l ⊙ b where outputs are scaled, W ← W diag(l) where inputs are; then l = 1."""
    for layer in layers(backbone):
        base = layer.get_base_layer()
        for scale in layer.ia3_l.values():
            if layer.is_feedforward:
                base.weight *= scale
            else:
                base.weight *= scale[:, None]
                if base.bias is not None:
                    base.bias *= scale
            scale.fill_(1.0)
