"""Attention: every token gathers from the tokens that it may see.

B  batch    T  tokens that look (queries)    S  tokens that are seen (keys)
D  model size    N  heads    H = D / N  size of a head
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.backbone.transformer.cache import KeyValues
from clplatform.backbone.transformer.config import LayerConfig
from clplatform.backbone.transformer.positions import Rotation, rotate


def attention(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    mask_BNTS: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Vaswani et al. 2017, Eq. 1, by PyTorch's kernels, which never write the [T, S] weights to memory where they can.

        Attention(Q, K, V) = softmax(Q Kᵀ / √H + mask) V

    Args:
        mask_BNTS: True where a token may be seen (0 in the formula; −∞ elsewhere), of any shape that broadcasts to
            [B, N, T, S]; None: all. A token that sees nothing gets zeros.
        causal: token t sees tokens 0 … t (T = S); instead of a mask.
        dropout: of the weights.

    Returns:
        [B, N, T, H].
    """
    return F.scaled_dot_product_attention(
        q_BNTH, k_BNSH, v_BNSH, attn_mask=mask_BNTS, dropout_p=dropout, is_causal=causal
    )


def padding_mask(tokens_BS: Tensor) -> Tensor:
    """Nobody sees padding: 1 (a token) or 0 (padding) [B, S] → bool [B, 1, 1, S]."""
    return tokens_BS.bool()[:, None, None]


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Nobody sees the future: bool [T, S], where the queries are the last T of S tokens."""
    keys_S = torch.arange(n_keys, device=device)
    return keys_S <= keys_S[n_keys - n_queries :, None]


class MultiHeadAttention(nn.Module):
    """Vaswani et al. 2017, § 3.2.2.

        MultiHead(Q, K, V) = Concat(head_1, …, head_N) W^O,  head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)

    The N projections of each kind are one matrix.

    Attributes:
        prefix: learned keys and values [P, D] in front of all others, which every token sees (`tuning=prefix`); None: none.
    """

    prefix: nn.ParameterList | None

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.attention_dropout
        self.q_proj = nn.Linear(config.size, config.size)
        self.k_proj = nn.Linear(config.size, config.size)
        self.v_proj = nn.Linear(config.size, config.size)
        self.out_proj = nn.Linear(config.size, config.size)
        self.prefix = None

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        cache: KeyValues | None = None,
    ) -> Tensor:
        """Self-attention, or cross-attention to a memory.

        Args:
            x_BTD: tokens that look.
            memory_BSD: tokens that are seen; None: `x_BTD`, after those of the cache.
            mask, causal: see `attention`.
            rotation: rotary positions of `x_BTD`, for self-attention.
            cache: keys and values of earlier tokens, to which these are added; of a memory: computed once.

        Returns:
            [B, T, D].
        """
        q_BNTH = self.split(self.q_proj(x_BTD))
        if memory_BSD is not None and cache is not None and cache.k_BNSH is not None and cache.v_BNSH is not None:
            k_BNSH, v_BNSH = cache.k_BNSH, cache.v_BNSH
        else:
            seen_BSD = x_BTD if memory_BSD is None else memory_BSD
            k_BNSH, v_BNSH = self.split(self.k_proj(seen_BSD)), self.split(self.v_proj(seen_BSD))
            if rotation is not None:
                q_BNTH, k_BNSH = rotate(q_BNTH, rotation), rotate(k_BNSH, rotation)
            if cache is not None:
                k_BNSH, v_BNSH = cache.extend(k_BNSH, v_BNSH)
        if self.prefix is not None:
            if causal:
                mask, causal = causal_mask(q_BNTH.shape[2], k_BNSH.shape[2], x_BTD.device), False
            k_BNSH, v_BNSH, mask = self.behind_prefix(k_BNSH, v_BNSH, mask)
        dropout = self.dropout if self.training else 0.0
        heads_BNTH = attention(q_BNTH, k_BNSH, v_BNSH, mask, causal=causal, dropout=dropout)
        return self.out_proj(heads_BNTH.transpose(1, 2).flatten(2))

    def behind_prefix(
        self, k_BNSH: Tensor, v_BNSH: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with those of the prefix in front, and the mask of both."""
        assert self.prefix is not None
        more = [self.split(p_PD.to(k_BNSH).expand(len(k_BNSH), -1, -1)) for p_PD in self.prefix]
        if mask is not None:
            mask = torch.cat([mask.new_ones(*mask.shape[:-1], more[0].shape[2]), mask], -1)
        return torch.cat([more[0], k_BNSH], 2), torch.cat([more[1], v_BNSH], 2), mask

    def split(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] → heads [B, N, T, H]."""
        return x_BTD.unflatten(2, (self.n_heads, -1)).transpose(1, 2)
