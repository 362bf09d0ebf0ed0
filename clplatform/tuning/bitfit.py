"""BitFit (Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning"): only biases are trained, those of layer
norms included. (They are not decayed.)
"""

from __future__ import annotations

from typing import Any

from clplatform.tuning.base import Tuning
from clplatform.types import ClplatformError, InputSpec


class BitFit(Tuning):
    """The backbone's biases."""

    name = "bitfit"

    def add(self, backbone: Any, spec: InputSpec) -> None:
        biases = [p for name, p in backbone.named_parameters() if name.rpartition(".")[2] == "bias"]
        if not biases:
            raise ClplatformError("tuning=bitfit: the backbone has no biases; choose another tuning, such as lora")
        for p in biases:
            p.requires_grad_(True)
