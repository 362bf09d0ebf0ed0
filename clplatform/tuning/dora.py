"""DoRA (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", Eq. 5), through PEFT's layers.

    h = m ⊙ (W + (α/r) B A) x / ‖W + (α/r) B A‖,   m = ‖W‖ at the start

LoRA changes the direction of each row of a weight, m its length; norms are those of the rows (one for each output) and get no
gradient (the paper's Section 4.3).
"""

from __future__ import annotations

from clplatform.tuning.lora import LoRA


class DoRA(LoRA):
    """LoRA with lengths of their own for the rows of a weight.

    Args:
        rank, alpha, dropout, targets: see `LoRA`.
    """

    name = "dora"
    dora = True
