"""An encoder that reads and a decoder that writes (Vaswani et al. 2017, Fig. 1; BART, Lewis et al. 2020).

B  batch    S  tokens of the source    T  tokens of the target    D  model size    V  vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplatform.backbone.transformer.decoder import Decoder, make_head
from clplatform.backbone.transformer.decoding import Decoding
from clplatform.backbone.transformer.encoder import Encoder


class EncoderDecoder(nn.Module):
    """P(target | source), token by token.

    Args:
        decoder: with cross-attention.
        tied: do encoder, decoder and head share one matrix of token embeddings (Press & Wolf 2017, § 3, three-way)?
        bias: does the head have a bias?
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, *, tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        if tied:
            decoder.embeddings.token.weight = encoder.embeddings.token.weight
        self.head = make_head(decoder.embeddings, tied=tied, bias=bias)

    def forward(
        self,
        source_BS: Tensor,
        target_BT: Tensor,
        source_mask_BS: Tensor | None = None,
        target_mask_BT: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, S] and [B, T], masks (1 for tokens, 0 for padding) → logits [B, T, V] of the tokens that follow in
        the target."""
        x_BTD = self.decoder(
            target_BT, mask_BS=target_mask_BT, memory_BMD=self.encoder(source_BS, source_mask_BS),
            memory_mask_BM=source_mask_BS,
        )  # fmt: skip
        return self.head(x_BTD)

    def decoding(
        self, source_BS: Tensor, mask_BS: Tensor | None = None, *, start: int, use_cache: bool = True
    ) -> Decoding:
        """Read the sources and begin to write, after the token `start`."""
        with torch.no_grad():
            inputs = {"memory_BMD": self.encoder(source_BS, mask_BS)}
        if mask_BS is not None:
            inputs["memory_mask_BM"] = mask_BS
        prompt_B1 = source_BS.new_full((len(source_BS), 1), start)
        return Decoding(self.decoder, self.head, prompt_B1, None, use_cache=use_cache, inputs=inputs)
