"""Which parts of a backbone are trained.

A frozen part keeps its parameters and runs in eval mode even while the rest trains: its dropout is off and its
batch-norm statistics do not move, so what is frozen is a fixed function.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import nn

Policy = Literal["none", "all"] | Annotated[int, Ge(0)]


class Freezable(nn.Module):
    """A module some of whose parts stay fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[str] = []  # names of the parts

    def blocks(self) -> list[Any]:
        raise NotImplementedError(f"{type(self).__name__} does not name its parts")

    def apply_policy(self, policy: Policy) -> None:
        """Freeze.

        Args:
            policy: `none`; `all`: only the head is trained; k: the first part (embeddings) and the k blocks after it
                stay fixed.
        """
        if policy == "none":
            return
        parts = [self] if policy == "all" else self.blocks()[: int(policy) + 1]
        self.frozen = [name for name, module in self.named_modules() if any(module is part for part in parts)]
        for part in parts:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Freezable:
        super().train(mode)
        for name in self.frozen:
            for module in self.get_submodule(name).modules():
                module.training = False
        return self
