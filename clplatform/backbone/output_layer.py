"""The output layer of a Hugging Face language model: all that is between its last hidden states and its logits.

Architectures differ there: BERT transforms the hidden states first, BART adds a bias, T5 scales, Gemma caps, Granite divides.
All of it is in the `forward` of the model, which is called here with the hidden states in place of the encoder or decoder that
would compute them; the model itself is not touched, so that copies, per-sample gradients and adapters work as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
)


class _Given:
    """In place of a model: gives these hidden states, whatever it is called with."""

    def __init__(self, output: Any) -> None:
        self.output = output
        self.decoder = self  # some architectures call the decoder within the model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _Around:
    """A model with some of its parts replaced."""

    def __init__(self, whole: Any, **instead: Any) -> None:
        self.__dict__.update(instead, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states [B, T, D] as `hidden_states` has them → logits [B, T, V] as the model itself has them."""
    whole: Any = model
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    output: Any = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)  # type: ignore[arg-type]
    if whole.config.is_encoder_decoder:
        inputs = {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}  # type: ignore[arg-type]
    if whole.base_model is whole:  # T5 has encoder and decoder side by side
        around = _Around(whole, decoder=_Given(output))
    else:
        if whole.config.is_encoder_decoder:
            output = Seq2SeqModelOutput(last_hidden_state=hidden)  # type: ignore[arg-type]
        around = _Around(whole, **{whole.base_model_prefix: _Given(output)})
    return type(whole).forward(around, **inputs).logits
