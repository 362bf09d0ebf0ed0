"""An encoder: every token sees every other, to the left and to the right (BERT, Devlin et al. 2019).

B  batch    T  tokens    D  model size
"""

from __future__ import annotations

from torch import Tensor, nn

from clplatform.backbone.transformer.attention import padding_mask
from clplatform.backbone.transformer.config import LayerConfig, initialise
from clplatform.backbone.transformer.embeddings import Embeddings
from clplatform.backbone.transformer.layers import EncoderLayer
from clplatform.backbone.transformer.positions import Rotation


def final_norm(config: LayerConfig) -> nn.Module:
    """Pre-norm layers leave the residual stream unnormalised, so a last normalisation follows (Xiong et al. 2020, Table 1);
    post-norm layers need none."""
    return nn.LayerNorm(config.size, eps=config.epsilon) if config.norm == "pre" else nn.Identity()


class EncoderStack(nn.Module):
    """Encoder layers on vectors, of whatever they are."""

    def __init__(self, config: LayerConfig, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(n_layers))
        self.norm = final_norm(config)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask, rotation)
        return self.norm(x_BTD)


class Encoder(nn.Module):
    """Embeddings and encoder layers."""

    def __init__(self, embeddings: Embeddings, config: LayerConfig, n_layers: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.stack = EncoderStack(config, n_layers)
        initialise(self, n_layers)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None, segments_BT: Tensor | None = None) -> Tensor:
        """Token ids [B, T] → hidden states [B, T, D].

        Args:
            mask_BT: 1 for tokens, 0 for padding; None: no padding.
            segments_BT: see `Embeddings`.
        """
        x_BTD, rotation = self.embeddings(ids_BT, segments_BT=segments_BT)
        return self.stack(x_BTD, None if mask_BT is None else padding_mask(mask_BT), rotation)
