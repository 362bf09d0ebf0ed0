"""A multi-layer perceptron on flattened pixels: what the classic numbers on Split and Permuted MNIST are for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt, MinLen
from torch import Tensor, nn

from clplatform.backbone.fit import require_modality
from clplatform.backbone.freeze import Freezable, Policy, freeze_parts
from clplatform.backbone.pixels import Pixels
from clplatform.types import Batch, InputSpec


class MLP(Freezable):
    """Linear layers with ReLU.

    Args:
        input: what a sample looks like, given by the platform.
        name: for reports.
        hidden: sizes of the layers; the last is the size of the features.
        dropout: after each layer.
        freeze: see `clplatform.backbone.freeze`.
        load_weights, assets: given by the platform; there is nothing to load.
    """

    source = "random"
    n_tokens = 1

    def __init__(
        self,
        *,
        input: InputSpec,
        name: str,
        hidden: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)],
        dropout: Annotated[float, Ge(0), Lt(1)],
        freeze: Policy,
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        super().__init__()
        require_modality(name, input, "image")
        assert input.shape is not None and input.mean is not None and input.std is not None
        self.pixels = Pixels(mean=input.mean, std=input.std, channels=input.shape[0])
        sizes = [input.shape[0] * input.shape[1] * input.shape[2], *hidden]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))
            for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.feature_size = sizes[-1]
        freeze_parts(self, freeze)

    def forward(self, batch: Batch) -> Tensor:
        """`pixel_values` [B, C, H, W] → features [B, D]."""
        x = self.pixels(batch["pixel_values"]).flatten(1)
        for layer in self.layers:
            x = layer(x)
        return x

    def blocks(self) -> list[Any]:
        return list(self.layers)

    def save_assets(self, folder: Path) -> None:
        """Nothing: the configuration tells all."""
