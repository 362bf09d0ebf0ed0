"""Gates on units: h' = a ⊙ h for chosen layers, different for each row of a batch.

The gated units are

* of a backbone whose blocks are one linear layer each (a perceptron): the outputs of every block;
* of any other (a Transformer): the hidden units of adapters, x ← x + D (a ⊙ GELU(U x + b)), on the output of every block but
  the first (the embeddings). D starts at zero, so that a new adapter changes nothing.

What has no gate (inputs, a Transformer's own layers) counts as always used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.module.hidden import first_output, linear_blocks, with_first_output
from clplatform.types import ClplatformError


class Adapter(nn.Module):
    """x [..., D] → D (GELU(U x + b)) [..., D], to be added to x."""

    def __init__(self, size: int, n_units: int) -> None:
        super().__init__()
        self.size = size
        self.up, self.down = nn.Linear(size, n_units), nn.Linear(n_units, size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


@dataclass(frozen=True)
class Site:
    """A layer of gated units."""

    size: int
    writer: nn.Linear  # its rows feed the units
    reader: nn.Linear | None  # its columns read them; None: only what comes after the backbone does
    module: nn.Module  # where the gate acts
    on_input: bool  # of that module, or on its output?


class Gating:
    """The gated units of a backbone, from input to output.

    Args:
        n_units: hidden units of each adapter, if it needs adapters.

    Attributes:
        adapters: to be trained and saved with the model; empty if the backbone has units to gate.
        sites: the layers.
    """

    def __init__(self, backbone: Any, n_units: int) -> None:
        blocks, self.adapters = backbone.blocks(), nn.ModuleList()
        self.adapted = []
        if linears := linear_blocks(backbone):
            readers = [*linears[1:], None]
            self.sites = [
                Site(w.out_features, w, r, b, on_input=False) for w, r, b in zip(linears, readers, blocks, strict=True)
            ]
            return
        self.adapted = blocks[1:]
        adapters = [Adapter(backbone.feature_size, n_units) for _ in self.adapted]
        self.adapters.extend(adapters)
        self.sites = [Site(n_units, a.up, a.down, a.down, on_input=True) for a in adapters]

    @property
    def sizes(self) -> list[int]:
        return [site.size for site in self.sites]

    @contextmanager
    def __call__(self, gates: Tensor) -> Iterator[None]:
        """Inside, the units of row b of a batch are multiplied by gates[b].

        Args:
            gates: [B, units of all layers].

        Raises:
            ClplatformError: blocks that need adapters differ in width.
        """
        with ExitStack() as stack:
            for site, gate in zip(self.sites, gates.split(self.sizes, dim=1), strict=True):
                stack.callback(_scale(site, gate).remove)
            for block, adapter in zip(self.adapted, self.adapters, strict=True):
                stack.callback(_add(block, adapter).remove)
            yield

    def depends_on(self, used: Tensor, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Where the outputs of used units depend on these parameters: on a weight, if both its ends are used (HAT's Eq. 2
        with gates of 0 and 1).

        Args:
            used: bool [units of all layers].

        Yields:
            Each parameter with bools of its shape.
        """
        rows: dict[int, Tensor] = {}
        columns: dict[int, Tensor] = {}
        for site, units in zip(self.sites, used.split(self.sizes), strict=True):
            rows |= {id(p): units for p in site.writer.parameters()}
            if site.reader is not None:
                columns[id(site.reader.weight)] = units
        for p in parameters:
            where = torch.ones_like(p, dtype=torch.bool)
            if id(p) in rows:
                where &= rows[id(p)].view(-1, *[1] * (p.ndim - 1))
            if id(p) in columns:
                where &= columns[id(p)]
            yield p, where


def _scale(site: Site, gate: Tensor) -> Any:
    def scaled(x: Tensor) -> Tensor:
        return x * gate.to(x.dtype).view(len(gate), *[1] * (x.ndim - 2), site.size)

    if site.on_input:
        return site.module.register_forward_pre_hook(lambda module, args: (scaled(args[0]),))
    return site.module.register_forward_hook(lambda module, args, output: scaled(output))  # type: ignore[arg-type]


def _add(block: nn.Module, adapter: Any) -> Any:
    def added(module: nn.Module, args: Any, output: Any) -> Any:
        x = first_output(output)
        if x.shape[-1] != adapter.size:
            raise ClplatformError(
                f"the backbone's blocks differ in width ({x.shape[-1]} and {adapter.size}), and adapters with gates are for one "
                "width: choose another backbone"
            )
        return with_first_output(output, x + adapter(x))

    return block.register_forward_hook(added)
