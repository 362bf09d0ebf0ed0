"""Layers: sub-layers that each add something to the residual stream.

B  batch    T  tokens    S  tokens of the encoder    D  model size    F  inner size of the feed-forward network
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.backbone.transformer.attention import MultiHeadAttention
from clplatform.backbone.transformer.cache import LayerCache
from clplatform.backbone.transformer.config import ACTIVATIONS, LayerConfig
from clplatform.backbone.transformer.positions import Rotation


class Residual(nn.Module):
    """A residual connection around a sub-layer f, with layer normalisation (Ba et al. 2016).

    pre:   x + f(LayerNorm(x))    Xiong et al. 2020, Table 1, right: trains without a warm-up
    post:  LayerNorm(x + f(x))    Vaswani et al. 2017, § 3.1
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.size, eps=config.epsilon)
        self.dropout = nn.Dropout(config.dropout)
        self.first = config.norm == "pre"

    def forward(self, x_BTD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        if self.first:
            return x_BTD + self.dropout(sublayer(self.norm(x_BTD)))
        return self.norm(x_BTD + self.dropout(sublayer(x_BTD)))


class FeedForward(nn.Module):
    """The same network at every position (Vaswani et al. 2017, Eq. 2, with GELU for ReLU).

    FFN(x) = W₂ · GELU(W₁ x + b₁) + b₂
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.size, config.inner_size)
        self.contract = nn.Linear(config.inner_size, config.size)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.activation_dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        inner_BTF = self.activation(self.expand(x_BTD))
        return self.contract(F.dropout(inner_BTF, self.dropout, self.training))


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward (Vaswani et al. 2017, Fig. 1, left)."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.attention, self.attention_residual = MultiHeadAttention(config), Residual(config)
        self.feed_forward, self.feed_forward_residual = FeedForward(config), Residual(config)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """[B, T, D] → [B, T, D]; `mask` and `rotation` as in `MultiHeadAttention`."""
        x_BTD = self.attention_residual(x_BTD, lambda y: self.attention(y, mask=mask, rotation=rotation))
        return self.feed_forward_residual(x_BTD, self.feed_forward)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention if there is an encoder, feed-forward (Vaswani et al. 2017, Fig. 1, right)."""

    def __init__(self, config: LayerConfig, *, cross: bool) -> None:
        super().__init__()
        self.attention, self.attention_residual = MultiHeadAttention(config), Residual(config)
        if cross:
            self.cross_attention, self.cross_attention_residual = MultiHeadAttention(config), Residual(config)
        self.feed_forward, self.feed_forward_residual = FeedForward(config), Residual(config)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        memory_mask: Tensor | None = None,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D].

        Args:
            memory_BSD: the encoder's output, for a layer with cross-attention.
            mask, causal: of the self-attention; `memory_mask`: of the cross-attention.
            cache: of this layer; the new tokens' keys and values are added.
        """
        own, cross = (None, None) if cache is None else (cache.own, cache.cross)
        x_BTD = self.attention_residual(
            x_BTD, lambda y: self.attention(y, mask=mask, causal=causal, rotation=rotation, cache=own)
        )
        if memory_BSD is not None:
            x_BTD = self.cross_attention_residual(
                x_BTD, lambda y: self.cross_attention(y, memory_BSD, mask=memory_mask, cache=cross)
            )
        return self.feed_forward_residual(x_BTD, self.feed_forward)
