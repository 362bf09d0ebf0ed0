"""P-tuning (Liu et al. 2021, "GPT Understands, Too", Sec. 3.2): tokens that are learned through a small network, PEFT's prompt
encoder.

    P = MLP(e)   or   P_i = MLP([LSTM→(e)_i; LSTM←(e)_i]),   e [L, D] learned, both networks too

The tokens are at the input, where those of prompt tuning are (see `clplatform.tuning.prompt`). The network ties them to each
other and to its own weights, which makes them easier to train; for the answers only P counts.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from peft import PromptEncoder, PromptEncoderConfig
from torch import Tensor, nn

from clplatform.tuning.prompt import Prompt

LAYERS = 2  # of the LSTM, as the authors have


class PTuning(Prompt):
    """Tokens behind the first, made by a network.

    Args:
        length: L.
        encoder: `mlp` (three layers), or `lstm`: a bidirectional one of two layers, and an MLP of two.
        hidden: size of the network's hidden layers; None: D.
    """

    name = "p_tuning"

    def __init__(
        self,
        *,
        length: Annotated[int, Ge(1)],
        encoder: Literal["mlp", "lstm"],
        hidden: Annotated[int, Ge(1)] | None,
    ) -> None:
        super().__init__(length=length)
        self.encoder: Literal["mlp", "lstm"] = encoder
        self.hidden = hidden

    def tokens(self, size: int) -> nn.Module:
        return EncodedTokens(self.length, size, self.encoder, self.hidden or size)


class EncodedTokens(nn.Module):
    """PEFT's prompt encoder, as the tokens [L, D] that it makes."""

    def __init__(self, length: int, size: int, encoder: Literal["mlp", "lstm"], hidden: int) -> None:
        super().__init__()
        config = PromptEncoderConfig(
            num_virtual_tokens=length, token_dim=size, num_transformer_submodules=1, encoder_hidden_size=hidden,
            encoder_reparameterization_type=encoder.upper(), encoder_num_layers=LAYERS, encoder_dropout=0.0,
        )  # fmt: skip
        self.encoder, self.length = PromptEncoder(config), length

    def __len__(self) -> int:
        return self.length

    def forward(self) -> Tensor:
        numbers = torch.arange(self.length, device=self.encoder.embedding.weight.device)
        return self.encoder(numbers[None])[0]
