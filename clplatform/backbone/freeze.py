"""Which parts of a backbone are trained.

A frozen part keeps its parameters and runs in eval mode even while the rest trains: its dropout is off and its
batch-norm statistics do not move, so what is frozen is a fixed function. (Many code bases leave dropout on in frozen
parts; then the features of a sample differ from pass to pass although nothing is learned.) Modules that are put into a
frozen part later, such as adapters, are not frozen and follow the mode of the whole.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import nn

from clplatform.types import ClplatformError

Policy = Literal["none", "all"] | Annotated[int, Ge(0)]


class Freezable(nn.Module):
    """A module some of whose parts stay fixed."""

    def __init__(self) -> None:
        super().__init__()
        # In a list, so that they are not registered a second time.
        self.frozen: list[nn.Module] = []

    def blocks(self) -> list[Any]:
        raise NotImplementedError(f"{type(self).__name__} does not name its parts")

    def train(self, mode: bool = True) -> Freezable:
        super().train(mode)
        for module in self.frozen:
            module.training = False
        return self


def freeze_parts(backbone: Freezable, policy: Policy) -> None:
    """Freeze parts of a backbone, in addition to what is frozen already.

    Args:
        policy: `none`: nothing; `all`: everything, so that only the head is trained; k: the first part (the
            embeddings) and the k blocks after it.

    Raises:
        ClplatformError: there are fewer blocks.
    """
    if policy == "none":
        return
    if policy == "all":
        parts: list[Any] = [backbone]
    else:
        blocks = backbone.blocks()
        if policy >= len(blocks):
            raise ClplatformError(
                f"backbone.freeze={policy}: the backbone has {len(blocks) - 1} blocks after its first part; "
                f"give 0 … {len(blocks) - 1}, or all"
            )
        parts = blocks[: policy + 1]
    for part in parts:
        part.requires_grad_(False)
        backbone.frozen += [m for m in part.modules() if m is not backbone]
    backbone.train(backbone.training)
