"""A decoder: a token sees itself and those before it. With a head it is a language model (GPT-2, Radford et al. 2019).

B  batch    T  new tokens    S  tokens in all, those in the cache included    M  tokens of the encoder
D  model size    V  vocabulary
"""

from __future__ import annotations

from torch import Tensor, nn

from clplatform.backbone.transformer.attention import causal_mask, padding_mask
from clplatform.backbone.transformer.cache import Cache
from clplatform.backbone.transformer.config import LayerConfig, initialise
from clplatform.backbone.transformer.decoding import Decoding
from clplatform.backbone.transformer.embeddings import Embeddings
from clplatform.backbone.transformer.encoder import final_norm
from clplatform.backbone.transformer.layers import DecoderLayer


class Decoder(nn.Module):
    """Embeddings and decoder layers.

    Args:
        cross: do its layers attend to an encoder's output?
    """

    def __init__(self, embeddings: Embeddings, config: LayerConfig, n_layers: int, *, cross: bool) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.layers = nn.ModuleList(DecoderLayer(config, cross=cross) for _ in range(n_layers))
        self.norm = final_norm(config)
        initialise(self, n_layers)

    def forward(
        self,
        ids_BT: Tensor,
        *,
        mask_BS: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        memory_BMD: Tensor | None = None,
        memory_mask_BM: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, T] → hidden states [B, T, D].

        Args:
            mask_BS: 1 for tokens, 0 for padding, of the tokens in the cache and of the new ones; None: no padding.
            positions_BT: of the new tokens; None: they follow those in the cache.
            cache: of earlier tokens; the new ones are added.
            memory_BMD, memory_mask_BM: the encoder's output and its padding.
        """
        start = 0 if cache is None else cache.length
        x_BTD, rotation = self.embeddings(ids_BT, start=start, positions_BT=positions_BT)
        n_new = ids_BT.shape[1]
        mask, causal = None, mask_BS is None and start == 0  # the kernels know the plain causal mask
        if mask_BS is not None:
            mask = causal_mask(n_new, start + n_new, ids_BT.device) & padding_mask(mask_BS)
        elif n_new > 1 and not causal:  # one new token sees all
            mask = causal_mask(n_new, start + n_new, ids_BT.device)
        memory_mask = None if memory_mask_BM is None else padding_mask(memory_mask_BM)
        for i, layer in enumerate(self.layers):
            x_BTD = layer(
                x_BTD, memory_BMD, mask=mask, causal=causal, memory_mask=memory_mask, rotation=rotation,
                cache=None if cache is None else cache.layers[i],
            )  # fmt: skip
        return self.norm(x_BTD)


def make_head(embeddings: Embeddings, *, tied: bool, bias: bool) -> nn.Linear:
    """Hidden states → logits. `tied`: its weight is the token embeddings' (Press & Wolf 2017, § 3): a token's logit is the
    product of the hidden state with the token's own vector."""
    n_tokens, size = embeddings.token.weight.shape
    head = nn.Linear(size, n_tokens, bias=bias)
    if tied:
        head.weight = embeddings.token.weight
    return head


class CausalLM(nn.Module):
    """A language model: P(token t | tokens before it) = softmax(W h_(t−1)).

    Args:
        decoder: without cross-attention.
        tied: is the head's weight that of the token embeddings?
    """

    def __init__(self, decoder: Decoder, *, tied: bool = True) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = make_head(decoder.embeddings, tied=tied, bias=False)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Token ids [B, T], mask (1 for tokens, 0 for padding) → logits [B, T, V] of the tokens that follow."""
        return self.head(self.decoder(ids_BT, mask_BS=mask_BT))

    def decoding(self, prompt_BT: Tensor, mask_BT: Tensor | None = None, *, use_cache: bool = True) -> Decoding:
        """Begin to continue prompts; shorter ones are padded on the left, where the mask is 0."""
        return Decoding(self.decoder, self.head, prompt_BT, mask_BT, use_cache=use_cache)
