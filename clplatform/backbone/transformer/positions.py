"""Where a token is: attention alone would see a set of tokens, not a sequence.

B  batch    T  tokens    D  model size    N  heads    H  size of a head
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clplatform.types import ClplatformError

Positions = Literal["sinusoidal", "learned", "rotary"]
# cos and sin of the angles by which a token's queries and keys are turned, each [B or 1, 1, T, H/2]
Rotation = tuple[Tensor, Tensor]

BASE = 10_000.0


def frequencies(size: int, device: torch.device) -> Tensor:
    """θ_i = 10000^(−2i/size), i = 0 … size/2 − 1, in float32.

    Raises:
        ClplatformError: the size is odd.
    """
    if size % 2:
        raise ClplatformError(f"sinusoidal and rotary positions need an even size, not {size}")
    return BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)


class Sinusoidal(nn.Module):
    """Vaswani et al. 2017, § 3.5; for any number of positions, and added to the embeddings.

        PE(t, 2i) = sin(t / 10000^(2i/D)),  PE(t, 2i+1) = cos(t / 10000^(2i/D))

    Args:
        size: D, even.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        frequencies(size, torch.device("cpu"))  # refuses an odd size
        self.size = size

    def forward(self, positions_BT: Tensor) -> Tensor:
        """int64 [B, T] → [B, T, D]."""
        angles_BTd = positions_BT[..., None] * frequencies(self.size, positions_BT.device)
        return torch.stack([angles_BTd.sin(), angles_BTd.cos()], -1).flatten(-2)


class Learned(nn.Embedding):
    """A vector for each position up to a longest, added to the embeddings (Gehring et al. 2017; BERT, GPT-2, BART).

    int64 [B, T] → [B, T, D].
    """


class Rotary(nn.Module):
    """Su et al. 2021 (RoFormer), Eqs. 14–15 and 34: queries and keys are turned by an angle that grows with the position, so
    that their product depends on the distance of two tokens only.

        (R_m q)ᵀ (R_n k) = qᵀ R_(n−m) k,  R_m turns the pair (2i, 2i+1) by m θ_i

    Args:
        head_size: H, even.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        frequencies(head_size, torch.device("cpu"))  # refuses an odd size
        self.head_size = head_size

    def forward(self, positions_BT: Tensor) -> Rotation:
        """int64 [B, T] → what `rotate` takes, the same for all heads and layers."""
        angles_B1Th = positions_BT[:, None, :, None] * frequencies(self.head_size, positions_BT.device)
        return angles_B1Th.cos(), angles_B1Th.sin()


def rotate(x_BNTH: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of components of queries or keys [B, N, T, H] (Su et al. 2021, Eq. 34); the angles are in float32, and so
    is the product."""
    cos, sin = rotation
    even, odd = x_BNTH.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).to(x_BNTH.dtype)
