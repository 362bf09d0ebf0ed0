"""Our Transformers as language models, from random weights: a decoder that goes on with a text, and an encoder-decoder that
reads one and writes another.

B  batch    S  tokens read    T  tokens written    D  size of the features    V  vocabulary
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from clplatform.backbone import prefix_lm
from clplatform.backbone.fit import require_modality
from clplatform.backbone.freeze import Freezable, Policy, freeze_parts
from clplatform.backbone.from_run import start_from_run
from clplatform.backbone.search import Search
from clplatform.backbone.transformer.config import Activation, LayerConfig, Norm
from clplatform.backbone.transformer.decoder import CausalLM, Decoder
from clplatform.backbone.transformer.decoding import Decoding
from clplatform.backbone.transformer.embeddings import Embeddings
from clplatform.backbone.transformer.encoder import Encoder
from clplatform.backbone.transformer.encoder_decoder import EncoderDecoder
from clplatform.backbone.transformer.positions import Positions
from clplatform.metric.flops import LENGTHS
from clplatform.types import Batch, InputSpec

Count = Annotated[int, Ge(1)]
Dropout = Annotated[float, Ge(0), Lt(1)]


def embeddings(input: InputSpec, config: LayerConfig, positions: Positions, max_length: int) -> Embeddings:
    """Of the tokens of a stream."""
    assert input.vocab_size is not None
    return Embeddings(
        n_tokens=input.vocab_size, size=config.size, head_size=config.head_size, positions=positions,
        dropout=config.dropout, max_length=max(max_length, *LENGTHS),  # operations are counted at these lengths
        scale=math.sqrt(config.size) if positions == "sinusoidal" else 1.0,
        norm=config.epsilon if config.norm == "post" else None,
    )  # fmt: skip


class TransformerDecoder(Freezable):
    """A language model: P(token t | tokens before it). Of pairs of texts, P(target | source): the target goes on with it.

    Args:
        input: what a sample looks like, given by the platform: it decides the vocabulary and the longest text.
        name: for reports.
        pretrained: run that it starts from; None: random weights.
        size: D.
        n_layers, n_heads: of the decoder; the heads divide the size.
        inner_size: of the feed-forward networks.
        activation, norm: see `LayerConfig`.
        positions: `learned`, `sinusoidal` or `rotary`.
        tied: is the output layer's weight that of the token embeddings?
        dropout: of embeddings, sub-layers and attention weights.
        freeze: see `clplatform.backbone.freeze`.
        problem: given by the platform: `seq2seq`, if it is to learn pairs of texts.
        load_weights: False builds the architecture only (given by the platform).
        assets: given by the platform; nothing is read there.

    Raises:
        ClplatformError: the stream is of images, or the sizes do not fit each other.
    """

    problems = frozenset({"causal_lm", "seq2seq"})
    reads = "input_ids"
    source = "random"
    n_tokens = 64  # a guess

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
        tied: bool,
        dropout: Dropout,
        freeze: Policy,
        problem: str = "causal_lm",
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        super().__init__()
        require_modality(name, input, "text")
        assert input.max_length is not None
        config = LayerConfig(
            size=size, n_heads=n_heads, inner_size=inner_size, activation=activation, norm=norm, dropout=dropout,
            attention_dropout=dropout,
        )  # fmt: skip
        self.pairs = problem == "seq2seq"
        longest = input.max_length
        if self.pairs:  # operations are counted with targets as long as their sources
            longest = max(longest + 2 + (input.max_target_length or 0), 2 * max(LENGTHS))
        own = embeddings(input, config, positions, longest)
        self.model = CausalLM(Decoder(own, config, n_layers, cross=False), tied=tied)
        self.feature_size, self.spec = size, input
        if pretrained is not None:
            self.source = pretrained
            if load_weights:
                start_from_run(
                    self, pretrained, name=name, input=input, size=size, n_layers=n_layers, n_heads=n_heads, inner_size=inner_size, activation=activation, norm=norm, positions=positions, tied=tied,
                )  # fmt: skip
        freeze_parts(self, freeze)

    @property
    def projection(self) -> nn.Module:
        """Features → logits over the vocabulary."""
        return self.model.head

    def forward(self, batch: Batch) -> Tensor:
        """`input_ids` [B, T] → features [B, T, D]. Padding is on the right, where a causal mask hides it.

        Of pairs of texts, `input_ids` and `attention_mask` [B, S] and `decoder_input_ids` [B, T] → the target's features
        [B, T, D], which has its source before it.
        """
        if not self.pairs or "decoder_input_ids" not in batch:
            return self.model.decoder(batch["input_ids"])
        ids_BT, _, places_BT = prefix_lm.joined(batch)
        return prefix_lm.of_targets(self.model.decoder(ids_BT), places_BT)

    def generate(self, batch: Batch, search: Search | None = None) -> Tensor:
        """What is written, by default the most likely token, again and again, int64 [B, T], filled up with the padding token.

        Of pairs of texts: for each source, from the first token on. Otherwise how it goes on with prompts that are padded
        on the left, without the prompts, with at most half as many tokens as a text of the stream has.
        """
        spec, prompt_BT, mask_BT = self.spec, batch["input_ids"], batch["attention_mask"]
        assert spec.max_length is not None and spec.pad_token_id is not None
        n = max(1, spec.max_length // 2)  # whatever else is in the batch
        if self.pairs:
            assert spec.bos_token_id is not None and spec.max_target_length is not None
            prompt_BT, mask_BT = prefix_lm.prompts(batch, spec.bos_token_id)
            n = spec.max_target_length
        decoding, search = self.decoding(prompt_BT, mask_BT), search or Search()
        written = search.write(decoding, max_new_tokens=n, end=spec.eos_token_id, pad=spec.pad_token_id)
        return written[:, prompt_BT.shape[1] :]

    def decoding(self, prompt_BT: Tensor, mask_BT: Tensor | None = None) -> Decoding:
        """Begin to go on with prompts, padded on the left."""
        return self.model.decoding(prompt_BT, mask_BT)

    def blocks(self) -> list[Any]:
        """The embeddings, then the decoder's layers."""
        return [self.model.decoder.embeddings, *self.model.decoder.layers]

    def save_assets(self, folder: Path) -> None:
        """Nothing: the configuration and the stream's metadata tell all."""


class TransformerSeq2Seq(Freezable):
    """P(target | source), token by token.

    Args:
        input: what a sample looks like, given by the platform.
        name: for reports.
        pretrained: run that it starts from; None: random weights.
        size: D.
        n_layers: of the encoder, and of the decoder.
        n_heads, inner_size, activation, norm, positions, dropout: as of `TransformerDecoder`.
        tied: do encoder, decoder and output layer share one matrix of token embeddings?
        beams: of the search when it writes; 1: the most likely token, again and again.
        length_penalty: see `length_penalty` (alpha) of the beam search.
        length_ratio: it writes at most so many times as many tokens as it reads, and ten; None: as many as a target may have.
        freeze: see `clplatform.backbone.freeze`.
        load_weights: False builds the architecture only (given by the platform).
        assets: given by the platform; nothing is read there.

    Raises:
        ClplatformError: the stream is of images, or the sizes do not fit each other.
    """

    problems = frozenset({"seq2seq"})
    reads = "input_ids"
    source = "random"
    n_tokens = 32  # a guess

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
        tied: bool,
        beams: Count,
        length_penalty: Annotated[float, Ge(0)],
        length_ratio: Annotated[float, Gt(0)] | None,
        dropout: Dropout,
        freeze: Policy,
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        super().__init__()
        require_modality(name, input, "text")
        assert input.max_length is not None and input.max_target_length is not None
        config = LayerConfig(
            size=size, n_heads=n_heads, inner_size=inner_size, activation=activation, norm=norm, dropout=dropout,
            attention_dropout=dropout,
        )  # fmt: skip
        encoder = Encoder(embeddings(input, config, positions, input.max_length), config, n_layers)
        own = embeddings(input, config, positions, input.max_target_length + 1)
        self.model = EncoderDecoder(encoder, Decoder(own, config, n_layers, cross=True), tied=tied)
        self.beams, self.length_penalty, self.length_ratio = beams, length_penalty, length_ratio
        self.feature_size, self.spec = size, input
        if pretrained is not None:
            self.source = pretrained
            if load_weights:
                start_from_run(
                    self, pretrained, name=name, input=input, size=size, n_layers=n_layers, n_heads=n_heads, inner_size=inner_size, activation=activation, norm=norm, positions=positions, tied=tied,
                )  # fmt: skip
        freeze_parts(self, freeze)

    @property
    def projection(self) -> nn.Module:
        """Features → logits over the vocabulary."""
        return self.model.head

    def forward(self, batch: Batch) -> Tensor:
        """`input_ids`, `attention_mask` [B, S] and `decoder_input_ids` [B, T] → features [B, T, D]."""
        mask_BS = batch["attention_mask"]
        memory_BSD = self.model.encoder(batch["input_ids"], mask_BS)
        return self.model.decoder(batch["decoder_input_ids"], memory_BMD=memory_BSD, memory_mask_BM=mask_BS)

    def generate(self, batch: Batch, search: Search | None = None) -> Tensor:
        """What is written for each source, int64 [B, T], from the first token on, filled up with the padding token; by default
        as the page says."""
        spec = self.spec
        assert spec.bos_token_id is not None and spec.pad_token_id is not None and spec.max_target_length is not None
        decoding = self.model.decoding(batch["input_ids"], batch["attention_mask"], start=spec.bos_token_id)
        end, pad, n = spec.eos_token_id, spec.pad_token_id, spec.max_target_length
        if self.length_ratio is not None:
            n = min(n, 10 + math.ceil(self.length_ratio * batch["input_ids"].shape[1]))
        search = search or Search(self.beams, self.length_penalty)
        return search.write(decoding, max_new_tokens=n, end=end, pad=pad)[:, 1:]

    def blocks(self) -> list[Any]:
        """The embeddings and layers of the encoder, then those of the decoder."""
        encoder, decoder = self.model.encoder, self.model.decoder
        return [encoder.embeddings, *encoder.stack.layers, decoder.embeddings, *decoder.layers]

    def save_assets(self, folder: Path) -> None:
        """Nothing: the configuration and the stream's metadata tell all."""
