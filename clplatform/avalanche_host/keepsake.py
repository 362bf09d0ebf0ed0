"""What plugins do to predictions (a bias correction, class means), saved with the model's weights.

A saved model holds tensors that the structure has room for. How large a plugin's state is only training tells, so it is
one tensor of bytes of any length, read when the first prediction needs it.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from clplatform.avalanche_host.decode import Decoder
from clplatform.avalanche_host.encode import Encoder
from clplatform.avalanche_host.facade import HostedStrategy
from clplatform.avalanche_host.state import around, put_around


class Keepsake(nn.Module):
    """A part of the learner (`extras`) that carries plugins' state without samples and copies of the model.

    Attributes:
        unread: have the bytes been loaded and not yet been given to the plugins?
    """

    content: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("content", torch.zeros(0, dtype=torch.uint8))
        self.unread = False

    def write(self, hosted: HostedStrategy) -> None:
        """Keep what the plugins hold now."""
        file = io.BytesIO()
        torch.save(around(Encoder(hosted, training=False)), file)
        self.content = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(self.content.device)
        self.unread = False

    def read(self, hosted: HostedStrategy) -> None:
        """Give the plugins what was kept."""
        file = io.BytesIO(self.content.cpu().numpy().tobytes())
        hosted.device = hosted.learner.device
        put_around(Decoder(hosted), torch.load(file, map_location="cpu", weights_only=True))
        self.unread = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        content = state_dict[f"{prefix}content"]
        self.content, self.unread = content.clone().to(self.content.device), len(content) > 0
