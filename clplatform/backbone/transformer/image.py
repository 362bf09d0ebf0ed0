"""Our Transformer encoder as a backbone for images, from random weights: the Vision Transformer (Dosovitskiy et al. 2021).

B  batch    C  channels    P  side of a patch, in pixels    T  patches    D  size of the features
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from clplatform.backbone.fit import fit_patches, require_modality
from clplatform.backbone.freeze import Freezable, Policy, freeze_parts
from clplatform.backbone.pixels import Pixels
from clplatform.backbone.transformer.config import Activation, LayerConfig, Norm, initialise
from clplatform.backbone.transformer.encoder import EncoderStack
from clplatform.backbone.transformer.text import Count
from clplatform.types import Batch, InputSpec


class PatchEmbeddings(nn.Module):
    """Patches as vectors, behind a class token, with learned positions (Dosovitskiy et al. 2021, Eq. 1).

        z = [x_class; E x¹; …; E x^T] + E_pos

    Args:
        side: of the square images, a multiple of `patch`.
        patch: P.
        dropout: of the sum.
    """

    def __init__(self, *, channels: int, side: int, patch: int, size: int, dropout: float) -> None:
        super().__init__()
        self.patch, self.n_patches = patch, (side // patch) ** 2
        self.projection = nn.Linear(channels * patch * patch, size)
        self.class_token = nn.Parameter(0.02 * torch.randn(size))
        self.position = nn.Embedding(1 + self.n_patches, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, C, height, width] → [B, 1 + T, D], patches row by row."""
        rows = pixels.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # [B, C, rows, P, columns, P]
        patches_BTX = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x_BTD = self.projection(patches_BTX)
        first_B1D = self.class_token.to(x_BTD.dtype).expand(len(x_BTD), 1, -1)
        return self.dropout(torch.cat([first_B1D, x_BTD], 1) + self.position.weight)


class TransformerImage(Freezable):
    """A Vision Transformer, of the size that its page says.

    Args:
        input: what a sample looks like, given by the platform.
        name: for reports.
        size: D.
        n_layers, n_heads: of the encoder; the heads divide the size.
        inner_size: of the feed-forward networks.
        activation, norm: see `LayerConfig`.
        patch_size: P; None: at most 8 × 8 patches. Images are enlarged to a square of a multiple of it.
        pooling: feature: the class token (`cls`), or the `mean` of the patches.
        dropout: of embeddings, sub-layers and attention weights.
        freeze: see `clplatform.backbone.freeze`.
        load_weights, assets: given by the platform; there is nothing to load.

    Raises:
        ClplatformError: the stream is of texts, or the sizes do not fit each other.
    """

    reads = "pixel_values"
    source = "random"

    def __init__(
        self,
        *,
        input: InputSpec,
        name: str,
        size: Count,
        n_layers: Count,
        n_heads: Count,
        inner_size: Count,
        activation: Activation,
        norm: Norm,
        patch_size: Count | None,
        pooling: Literal["cls", "mean"],
        dropout: Annotated[float, Ge(0), Lt(1)],
        freeze: Policy,
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        super().__init__()
        require_modality(name, input, "image")
        assert input.shape is not None and input.mean is not None and input.std is not None
        channels, longest = input.shape[0], max(input.shape[1:])
        config = LayerConfig(
            size=size, n_heads=n_heads, inner_size=inner_size, activation=activation, norm=norm, dropout=dropout,
            attention_dropout=dropout,
        )  # fmt: skip
        if patch_size is None:
            patch, side = fit_patches(longest)
        else:
            patch, side = patch_size, -(-longest // patch_size) * patch_size
        self.pixels = Pixels(mean=input.mean, std=input.std, channels=channels, size=(side, side))
        self.embeddings = PatchEmbeddings(channels=channels, side=side, patch=patch, size=size, dropout=dropout)
        self.stack = EncoderStack(config, n_layers)
        initialise(self, n_layers)
        self.pooling, self.feature_size = pooling, size
        freeze_parts(self, freeze)

    @property
    def n_tokens(self) -> int:
        """Patches of an image."""
        return self.embeddings.n_patches

    def forward(self, batch: Batch) -> Tensor:
        """`pixel_values` [B, C, H, W] → features [B, D]."""
        x_BTD = self.stack(self.embeddings(self.pixels(batch["pixel_values"])))
        return x_BTD[:, 0] if self.pooling == "cls" else x_BTD[:, 1:].mean(1)

    def blocks(self) -> list[Any]:
        """The embeddings, then the encoder's layers."""
        return [self.embeddings, *self.stack.layers]

    def save_assets(self, folder: Path) -> None:
        """Nothing: the configuration tells all."""
