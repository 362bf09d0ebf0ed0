"""Any Hugging Face language model that writes, from a configuration (random weights) or from pretrained weights: causal (GPT-2,
Llama, OPT, …) and encoder-decoder (BART, T5, Marian, …). Masked ones are in `huggingface.py`.

B  batch    S  tokens read    T  tokens written    D  size of the features    V  vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from transformers import GenerationConfig

from clplatform.backbone.architecture import configure, longest_text, make_model, parts, set_dropout
from clplatform.backbone.fit import require_modality
from clplatform.backbone.freeze import Freezable, Policy, freeze_parts
from clplatform.backbone.from_run import run_model, start_from_run
from clplatform.backbone.output_layer import logits_of
from clplatform.backbone.pretrained import resolve_pretrained
from clplatform.types import Batch, ClplatformError, InputSpec

Count = Annotated[int, Ge(1)]
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# What a pretrained model needs to write at all (Marian must not write its padding token). All else of its own
# settings for generation is taste, and the page's.
NEEDED = ("bad_words_ids", "suppress_tokens", "forced_bos_token_id")


class HuggingFaceWriter(Freezable):
    """What causal models and encoder-decoders share.

    Args:
        input: what a sample looks like, given by the platform: it decides the vocabulary of random weights.
        name: for reports.
        config: of a model with random weights: `model_type` and what its configuration class takes.
        pretrained: folder or hub id, or a run of such a backbone; then `config` only overrides.
        package: see `resolve_pretrained`.
        dropout: sets every dropout probability; None: as configured.
        attention: implementation of attention (`sdpa`, `eager`, …).
        beams: of the search when it writes; 1: the most likely token, again and again.
        length_penalty: of the beam search: a text's log probability is divided by its length to this power.
        load_weights: False builds the architecture only.
        assets: folder with the `config.json` of a saved model; then nothing else is looked for.

    Raises:
        ClplatformError: the model is not one for this problem, or not one for these texts.
    """

    reads = "input_ids"
    kind: ClassVar[str]

    def __init__(
        self, *, input: InputSpec, name: str, config: dict[str, Any] | None, pretrained: str | None, package: str | None,
        dropout: float | None, attention: str, beams: int, length_penalty: float, load_weights: bool,
        assets: Path | None,
    ) -> None:  # fmt: skip
        super().__init__()
        require_modality(name, input, "text")
        if pretrained is None:
            config = {**(config or {}), "vocab_size": input.vocab_size}
            self.source = "random"
        else:
            self.source = resolve_pretrained(pretrained, package) if assets is None else pretrained
        from_run = assets is None and run_model(pretrained) is not None
        self.config: Any = configure(name, config or {}, self.source, reads=self.reads, kind=self.kind, assets=assets)
        if pretrained is None:
            for token in TOKENS:
                setattr(self.config, token, getattr(input, token))
            self.config.decoder_start_token_id = input.bos_token_id
        if dropout is not None:
            set_dropout(self.config, dropout)
        self.model: Any = make_model(
            name, self.config, self.source, load=load_weights and not from_run and self.source != "random",
            reads=self.reads,
            attention=attention, kind=self.kind,
        )  # fmt: skip
        self.feature_size, self.spec = int(self.model.get_output_embeddings().weight.shape[1]), input
        own = self.model.generation_config
        if assets is not None and (assets / "generation_config.json").is_file():
            own = GenerationConfig.from_pretrained(assets)
        kept = {n: v for n in NEEDED if (v := getattr(own, n, None)) is not None}
        self.model.generation_config = GenerationConfig(**kept)  # whatever else were in it would be the default
        self.beams, self.length_penalty = beams, length_penalty
        self._check_tokens(name)
        if from_run and load_weights and pretrained is not None:
            start_from_run(self, pretrained, name=name, input=input, core=self.model.base_model)

    def _check_tokens(self, name: str) -> None:
        spec = self.spec
        assert spec.vocab_size is not None and spec.max_length is not None
        if spec.vocab_size > self.config.vocab_size:
            raise ClplatformError(
                f"backbone={name} knows {self.config.vocab_size} tokens, the stream's tokenizer has {spec.vocab_size}: "
                "use the tokenizer that belongs to the backbone"
            )
        longest = longest_text(self.model)
        for setting in ("max_length", "max_target_length"):
            wanted = getattr(spec, setting)
            if longest is not None and wanted is not None and wanted > longest:
                raise ClplatformError(f"stream.{setting}={wanted}: backbone={name} takes at most {longest} tokens")

    @torch.no_grad()
    def _check_output(self, name: str, batch: Batch, logits: Tensor) -> None:
        """Is what we make of features what the model itself makes?"""
        found = self.projection(self(batch))
        if not torch.allclose(found, logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            raise ClplatformError(
                f"backbone={name}: {type(self.model).__name__} computes its logits in a way that is not known here"
            )

    @property
    def projection(self) -> Any:
        """Features [B, T, D] → logits [B, T, V] as the model itself has them."""
        return self._project

    def _project(self, features: Tensor) -> Tensor:
        return logits_of(self.model, features)

    def _write(self, batch: Batch, **limits: int) -> Tensor:
        """The tokens that the model writes, those that it begins with included."""
        spec = self.spec
        config = GenerationConfig(
            do_sample=False, num_beams=self.beams, length_penalty=self.length_penalty, pad_token_id=spec.pad_token_id,
            eos_token_id=spec.eos_token_id, bos_token_id=spec.bos_token_id, **limits,
        )  # fmt: skip
        if self.beams == 1:
            config.length_penalty = None  # it has no say, and Hugging Face would warn
        return self.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
        )

    def save_assets(self, folder: Path) -> None:
        """The model's `config.json` and `generation_config.json`."""
        self.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)


class HuggingFaceCausal(HuggingFaceWriter):
    """A model that goes on with a text: P(token t | tokens before it). GPT-2, Llama, OPT, …

    Args:
        freeze: see `clplatform.backbone.freeze`. All others: see `HuggingFaceWriter`.
    """

    problems = frozenset({"causal_lm"})
    kind = "causal_lm"
    n_tokens = 64  # a guess

    def __init__(
        self,
        *,
        input: InputSpec,
        name: str,
        config: dict[str, Any] | None,
        pretrained: str | None,
        package: str | None,
        dropout: Annotated[float, Ge(0), Lt(1)] | None,
        attention: str,
        beams: Count,
        length_penalty: float,
        freeze: Policy,
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        super().__init__(
            input=input, name=name, config=config, pretrained=pretrained, package=package, dropout=dropout,
            attention=attention, beams=beams, length_penalty=length_penalty, load_weights=load_weights, assets=assets,
        )  # fmt: skip
        self._check(name)
        freeze_parts(self, freeze)

    @torch.no_grad()
    def _check(self, name: str) -> None:
        """The model must not see what it is to predict: BERT is among Hugging Face's causal models too."""
        self.eval()
        ids = torch.arange(8).view(2, 4) % self.config.vocab_size
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        other = {**batch, "input_ids": ids.clone().index_fill_(1, torch.tensor([3]), 4 % self.config.vocab_size)}
        before, after = self(batch)[:, :3], self(other)[:, :3]
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-5 * float(before.abs().max())):
            raise ClplatformError(
                f"backbone={name}: {type(self.model).__name__} sees the tokens that it is to predict; choose a decoder, such "
                "as gpt2, or stream.problem=masked_lm"
            )
        self._check_output(name, batch, self.model(**batch).logits)
        self.train()

    def forward(self, batch: Batch) -> Tensor:
        """`input_ids` and `attention_mask` [B, T] → features [B, T, D]."""
        return self.model.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state

    def generate(self, batch: Batch) -> Tensor:
        """How the model goes on with prompts that are padded on the left, int64 [B, T], without the prompts; filled up with
        the padding token. It writes at most half as many tokens as a text of the stream has."""
        assert self.spec.max_length is not None
        n = batch["input_ids"].shape[1]
        return self._write(batch, max_new_tokens=max(1, self.spec.max_length // 2))[:, n:]

    def blocks(self) -> list[Any]:
        """The embeddings, then the decoder's layers."""
        return parts(self.model.get_decoder())


class HuggingFaceSeq2Seq(HuggingFaceWriter):
    """A model that reads a text and writes another: P(target | source), token by token. BART, T5, Marian, …

    Args:
        freeze: see `clplatform.backbone.freeze`. All others: see `HuggingFaceWriter`.
    """

    problems = frozenset({"seq2seq"})
    kind = "seq2seq"
    n_tokens = 32  # a guess

    def __init__(
        self,
        *,
        input: InputSpec,
        name: str,
        config: dict[str, Any] | None,
        pretrained: str | None,
        package: str | None,
        dropout: Annotated[float, Ge(0), Lt(1)] | None,
        attention: str,
        beams: Count,
        length_penalty: float,
        freeze: Policy,
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        super().__init__(
            input=input, name=name, config=config, pretrained=pretrained, package=package, dropout=dropout,
            attention=attention, beams=beams, length_penalty=length_penalty, load_weights=load_weights, assets=assets,
        )  # fmt: skip
        self._check(name)
        freeze_parts(self, freeze)

    @torch.no_grad()
    def _check(self, name: str) -> None:
        self.eval()
        ids = torch.arange(8).view(2, 4) % self.config.vocab_size
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :3]}
        self._check_output(name, batch, self.model(**batch).logits)
        self.train()

    def forward(self, batch: Batch) -> Tensor:
        """`input_ids`, `attention_mask` [B, S] and `decoder_input_ids` [B, T] → features [B, T, D]. The target's padding is
        on the right, where a causal mask hides it."""
        mask = batch["attention_mask"]
        memory = self.model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return self.model.get_decoder()(
            input_ids=batch["decoder_input_ids"], encoder_hidden_states=memory, encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state  # fmt: skip

    def generate(self, batch: Batch) -> Tensor:
        """What is written for each source, int64 [B, T], from the first token on; filled up with the padding token."""
        spec = self.spec
        assert spec.max_target_length is not None and spec.bos_token_id is not None
        limits = {"max_new_tokens": spec.max_target_length, "decoder_start_token_id": spec.bos_token_id}
        return self._write(batch, **limits)[:, 1:]

    def blocks(self) -> list[Any]:
        """The embeddings of both, then the layers of the encoder, then those of the decoder."""
        (read, *encoder), (written, *decoder) = parts(self.model.get_encoder()), parts(self.model.get_decoder())
        return [nn.ModuleList([*read, *written]), *encoder, *decoder]
