"""Our Transformer encoder as a backbone for texts, from random weights; with an output layer a masked language model.

B  batch    T  tokens    D  size of the features
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from torch import Tensor

from clplatform.backbone.fit import require_modality
from clplatform.backbone.freeze import Freezable, Policy, freeze_parts
from clplatform.backbone.from_run import start_from_run
from clplatform.backbone.transformer.config import Activation, LayerConfig, Norm
from clplatform.backbone.transformer.decoder import make_head
from clplatform.backbone.transformer.embeddings import Embeddings
from clplatform.backbone.transformer.encoder import Encoder
from clplatform.backbone.transformer.positions import Positions
from clplatform.metric.flops import LENGTHS
from clplatform.types import Batch, InputSpec

Count = Annotated[int, Ge(1)]


class TransformerText(Freezable):
    """An encoder of texts, of the size that its page says.

    Args:
        input: what a sample looks like, given by the platform: it decides the vocabulary and the longest text.
        name: for reports.
        pretrained: run that it starts from; None: random weights.
        size: D.
        n_layers, n_heads: of the encoder; the heads divide the size.
        inner_size: of the feed-forward networks.
        activation, norm: see `LayerConfig`.
        positions: `learned`, `sinusoidal` or `rotary`.
        pooling: feature: the first token (`cls`), or the `mean` of the tokens that are not padding.
        dropout: of embeddings, sub-layers and attention weights.
        freeze: see `clplatform.backbone.freeze`.
        problem: given by the platform: features are those of the text, or of each token.
        load_weights: False builds the architecture only (given by the platform).
        assets: given by the platform; nothing is read there.

    Raises:
        ClplatformError: the stream is of images, or the sizes do not fit each other.
    """

    problems = frozenset({"classification", "token_classification", "question_answering", "masked_lm"})
    reads = "input_ids"
    source = "random"
    n_tokens = 16  # a guess

    def __init__(
        self,
        *,
        input: InputSpec,
        name: str,
        pretrained: str | None,
        size: Count,
        n_layers: Count,
        n_heads: Count,
        inner_size: Count,
        activation: Activation,
        norm: Norm,
        positions: Positions,
        pooling: Literal["cls", "mean"],
        dropout: Annotated[float, Ge(0), Lt(1)],
        freeze: Policy,
        problem: str = "classification",
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        super().__init__()
        require_modality(name, input, "text")
        assert input.vocab_size is not None and input.max_length is not None
        config = LayerConfig(
            size=size, n_heads=n_heads, inner_size=inner_size, activation=activation, norm=norm, dropout=dropout,
            attention_dropout=dropout,
        )  # fmt: skip
        embeddings = Embeddings(
            n_tokens=input.vocab_size, size=size, head_size=config.head_size, positions=positions, dropout=dropout,
            max_length=max(input.max_length, *LENGTHS),  # operations are counted at these lengths
            scale=math.sqrt(size) if positions == "sinusoidal" else 1.0,
            norm=config.epsilon if norm == "post" else None,
        )  # fmt: skip
        self.encoder = Encoder(embeddings, config, n_layers)
        self.pooling, self.feature_size = (pooling if problem == "classification" else "none"), size
        if problem == "masked_lm":  # logits of features, as `Backbone` has it
            self.projection = make_head(embeddings, tied=True, bias=True)
        if pretrained is not None:
            self.source = pretrained
            if load_weights:
                start_from_run(
                    self, pretrained, name=name, input=input, size=size, n_layers=n_layers, n_heads=n_heads, inner_size=inner_size, activation=activation, norm=norm, positions=positions,
                )  # fmt: skip
        freeze_parts(self, freeze)

    def forward(self, batch: Batch) -> Tensor:
        """`input_ids` and `attention_mask` [B, T] → features [B, D], of tokens [B, T, D]."""
        mask_BT = batch["attention_mask"]
        x_BTD = self.encoder(batch["input_ids"], mask_BT)
        if self.pooling == "none":
            return x_BTD
        if self.pooling == "cls":
            return x_BTD[:, 0]
        weight_BT1 = mask_BT[:, :, None].to(x_BTD.dtype)
        return (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)

    def blocks(self) -> list[Any]:
        """The embeddings, then the encoder's layers."""
        return [self.encoder.embeddings, *self.encoder.stack.layers]

    def save_assets(self, folder: Path) -> None:
        """Nothing: the configuration and the stream's metadata tell all."""
