"""Full fine-tuning: everything is trained that `backbone.freeze` does not freeze."""

from __future__ import annotations

from typing import Any

from clplatform.tuning.base import Tuning
from clplatform.types import InputSpec


class Full(Tuning):
    """The backbone as it is built."""

    name = "full"

    def apply(self, backbone: Any, spec: InputSpec) -> None:
        """Nothing."""
