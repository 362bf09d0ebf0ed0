"""Any Hugging Face language model that writes, from a configuration (random weights) or from pretrained weights: causal (GPT-2,
Llama, OPT, …) and encoder-decoder (BART, T5, Marian, …). Masked ones are in `huggingface.py`.

B  batch    S  tokens read    T  tokens written    D  size of the features    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from transformers import GenerationConfig

from clplatform.backbone import prefix_lm
from clplatform.backbone.architecture import configure, longest_text, make_model, parts, quiet, set_dropout
from clplatform.backbone.fit import require_modality
from clplatform.backbone.freeze import Freezable, Policy, freeze_parts
from clplatform.backbone.from_run import start_from_run
from clplatform.backbone.output_layer import logits_of
from clplatform.backbone.pretrained import Origin
from clplatform.backbone.search import Search
from clplatform.metric.flops import LENGTHS
from clplatform.types import Batch, ClplatformError, InputSpec

Count = Annotated[int, Ge(1)]
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# What a pretrained model needs to write at all (Marian must not write its padding token). All else of its own
# settings for generation is taste, and the page's.
NEEDED = ("bad_words_ids", "suppress_tokens", "forced_bos_token_id")


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Inside, the global generators, which are all that Hugging Face knows, go on from this one."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        yield


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
        freeze: see `clplatform.backbone.freeze`.
        problem: given by the platform.
        load_weights: False builds the architecture only.
        assets: folder with the `config.json` of a saved model; then nothing else is looked for.

    Raises:
        ClplatformError: the model is not one for this problem, or not one for these texts.
    """

    reads = "input_ids"
    kind: ClassVar[str]

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
        problem: str | None = None,
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        super().__init__()
        require_modality(name, input, "text")
        self.pairs = self.kind == "causal_lm" and problem == "seq2seq"  # the target goes on with the source
        if pretrained is None:
            config = {**(config or {}), "vocab_size": input.vocab_size}
        origin = Origin.of(pretrained, package, load_weights=load_weights, assets=assets)
        self.source = origin.source
        with quiet():  # its own special tokens may be outside a smaller vocabulary; they are replaced
            self.config: Any = configure(
                name, config or {}, self.source, reads=self.reads, kind=self.kind, assets=assets
            )
        if pretrained is None:
            for token in TOKENS:
                setattr(self.config, token, getattr(input, token))
            self.config.decoder_start_token_id = input.bos_token_id
        if dropout is not None:
            set_dropout(self.config, dropout)
        self.model: Any = make_model(
            name, self.config, self.source, load=origin.load, reads=self.reads, attention=attention, kind=self.kind,
        )  # fmt: skip
        self.feature_size, self.spec = int(self.model.get_output_embeddings().weight.shape[1]), input
        own = self.model.generation_config
        if assets is not None and (assets / "generation_config.json").is_file():
            own = GenerationConfig.from_pretrained(assets)
        kept = {n: v for n in NEEDED if (v := getattr(own, n, None)) is not None}
        self.model.generation_config = GenerationConfig(**kept)  # whatever else were in it would be the default
        self.beams, self.length_penalty = beams, length_penalty
        self._check_tokens(name)
        if origin.run is not None:
            start_from_run(
                self, origin.run, name=name, input=input, core=self.model.base_model, n_added=int(self.pairs)
            )
        self._make_room()
        self._check(name)
        freeze_parts(self, freeze)

    def _check(self, name: str) -> None:
        """Is it what a model of its kind must be?"""
        raise NotImplementedError

    def _check_tokens(self, name: str) -> None:
        spec, longest = self.spec, longest_text(self.model)
        assert spec.vocab_size is not None and spec.max_length is not None
        # A stream of pairs may have added the token from which a target starts.
        if spec.vocab_size > self.config.vocab_size + (self.pairs and self.source != "random"):
            raise ClplatformError(
                f"backbone={name} knows {self.config.vocab_size} tokens, the stream's tokenizer has {spec.vocab_size}: "
                "use the tokenizer that belongs to the backbone"
            )
        if longest is None:
            return
        for setting in ("max_length", "max_target_length"):
            wanted = getattr(spec, setting)
            if wanted is not None and wanted > longest:
                raise ClplatformError(f"stream.{setting}={wanted}: backbone={name} takes at most {longest} tokens")
        if self.pairs:
            assert spec.max_target_length is not None
            both = max(
                spec.max_length + spec.max_target_length + 1, 2 * max(LENGTHS)
            )  # operations are counted at these
            if both > longest:
                raise ClplatformError(
                    f"stream.max_length={spec.max_length} and stream.max_target_length={spec.max_target_length}: "
                    f"backbone={name} takes at most {longest} tokens, and reads source and target as one text of up to {both}; "
                    "give shorter ones, or another backbone"
                )

    def _make_room(self) -> None:
        """A vector for the token that the stream has added to a pretrained vocabulary: near the mean of all others."""
        if self.spec.vocab_size is not None and self.spec.vocab_size > self.config.vocab_size:
            with quiet():
                self.model.resize_token_embeddings(self.spec.vocab_size)

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

    def _write(self, batch: Batch, search: Search | None, **limits: int) -> Tensor:
        """The tokens that the model writes, those that it begins with included; by default as the page says."""
        spec, search = self.spec, search or Search(self.beams, self.length_penalty)
        config = GenerationConfig(
            pad_token_id=spec.pad_token_id, eos_token_id=spec.eos_token_id, bos_token_id=spec.bos_token_id,
            **search.hugging_face(), **limits,
        )  # fmt: skip
        with drawing_from(search.generator):
            return self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
            )

    def save_assets(self, folder: Path) -> None:
        """The model's `config.json` and `generation_config.json`."""
        self.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)


class HuggingFaceCausal(HuggingFaceWriter):
    """A model that goes on with a text: P(token t | tokens before it). GPT-2, Llama, OPT, … Of pairs of texts, P(target |
    source): the target goes on with it. Arguments: see `HuggingFaceWriter`."""

    problems = frozenset({"causal_lm", "seq2seq"})
    kind = "causal_lm"
    n_tokens = 64  # a guess

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
        """`input_ids` and `attention_mask` [B, T] → features [B, T, D]. Padding is on the right.

        Of pairs of texts, `input_ids` and `attention_mask` [B, S] and `decoder_input_ids` [B, T] → the target's features
        [B, T, D], which has its source before it.
        """
        if not self.pairs or "decoder_input_ids" not in batch:
            return self._read(batch["input_ids"], batch["attention_mask"])
        ids_BL, mask_BL, places_BT = prefix_lm.joined(batch)
        return prefix_lm.of_targets(self._read(ids_BL, mask_BL), places_BT)

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def generate(self, batch: Batch, search: Search | None = None) -> Tensor:
        """What is written, int64 [B, T], filled up with the padding token.

        Of pairs of texts: for each source, from the first token on. Otherwise how it goes on with prompts that are padded
        on the left, without the prompts, with at most half as many tokens as a text of the stream has.
        """
        spec = self.spec
        assert spec.max_length is not None
        prompt, n = {name: batch[name] for name in ("input_ids", "attention_mask")}, max(1, spec.max_length // 2)
        if self.pairs:
            assert spec.bos_token_id is not None and spec.max_target_length is not None
            prompt["input_ids"], prompt["attention_mask"] = prefix_lm.prompts(batch, spec.bos_token_id)
            n = spec.max_target_length
        return self._write(prompt, search, max_new_tokens=n)[:, prompt["input_ids"].shape[1] :]

    def decoding(self, prompt_BT: Tensor) -> Cached:
        """Begin to go on with prompts of one length."""
        return Cached(self.model, prompt_BT)

    def blocks(self) -> list[Any]:
        """The embeddings, then the decoder's layers."""
        return parts(self.model.get_decoder())


class Cached:
    """Texts so far, with what a model has computed for them (keys and values), so that a new token costs one token's work."""

    def __init__(self, model: Any, ids_BT: Tensor) -> None:
        self.model, self.ids_BT = model, ids_BT
        self.kept: Any = None

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token, float32 [B, V]."""
        new_BT = self.ids_BT if self.kept is None else self.ids_BT[:, -1:]
        output = self.model(
            input_ids=new_BT, attention_mask=torch.ones_like(self.ids_BT), past_key_values=self.kept, use_cache=True
        )
        self.kept = output.get("past_key_values")  # None: a model that keeps none; it reads all again
        return output.logits[:, -1].float()

    def append(self, tokens_B: Tensor) -> None:
        """Add a token to every text."""
        self.ids_BT = torch.cat([self.ids_BT, tokens_B[:, None]], 1)


class HuggingFaceSeq2Seq(HuggingFaceWriter):
    """A model that reads a text and writes another: P(target | source), token by token. BART, T5, Marian, … Arguments: see
    `HuggingFaceWriter`."""

    problems = frozenset({"seq2seq"})
    kind = "seq2seq"
    n_tokens = 32  # a guess

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

    def generate(self, batch: Batch, search: Search | None = None) -> Tensor:
        """What is written for each source, int64 [B, T], from the first token on; filled up with the padding token."""
        spec = self.spec
        assert spec.max_target_length is not None and spec.bos_token_id is not None
        limits = {"max_new_tokens": spec.max_target_length, "decoder_start_token_id": spec.bos_token_id}
        return self._write(batch, search, **limits)[:, 1:]

    def blocks(self) -> list[Any]:
        """The embeddings of both, then the layers of the encoder, then those of the decoder."""
        (read, *encoder), (written, *decoder) = parts(self.model.get_encoder()), parts(self.model.get_decoder())
        return [nn.ModuleList([*read, *written]), *encoder, *decoder]
