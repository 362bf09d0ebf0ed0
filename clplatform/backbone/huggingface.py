"""Any Hugging Face encoder of images or text, from a configuration (random weights) or from pretrained weights."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from clplatform.backbone.architecture import configure, longest_text, make_model, parts, reason, set_dropout
from clplatform.backbone.fit import fit_patches, require_modality
from clplatform.backbone.freeze import Freezable, Policy, freeze_parts
from clplatform.backbone.from_run import require_run, run_input, start_from_run
from clplatform.backbone.output_layer import logits_of
from clplatform.backbone.pixels import Pixels
from clplatform.backbone.pretrained import Origin, preprocessor
from clplatform.types import Batch, ClplatformError, InputSpec

# Names of the parameter that becomes the class token.
CLASS_TOKEN = re.compile(r"(cls|class)_(token|embed)")


class HuggingFaceEncoder(Freezable):
    """What image and text encoders share.

    Args:
        name: for reports.
        config: of a model with random weights: `model_type` and what its configuration class takes.
        pretrained: folder or hub id, or a run of such a backbone; then `config` only overrides.
        package: see `resolve_pretrained`.
        dropout: sets every dropout probability; None: as configured.
        attention: implementation of attention (`sdpa`, `eager`, …).
        load_weights: False builds the architecture only.
        assets: folder with the `config.json` of a saved model; then nothing else is looked for.
    """

    reads: ClassVar[str]
    kind = "encoder"
    needs_pooler = False

    def __init__(
        self, *, name: str, config: dict[str, Any] | None, pretrained: str | None, package: str | None,
        dropout: float | None, attention: str, load_weights: bool, assets: Path | None,
    ) -> None:  # fmt: skip
        super().__init__()
        origin = Origin.of(pretrained, package, load_weights=load_weights, assets=assets)
        self.source, self.run = origin.source, origin.run
        self.config = configure(name, config or {}, self.source, reads=self.reads, kind=self.kind, assets=assets)
        if dropout is not None:
            set_dropout(self.config, dropout)
        self.model: Any = make_model(
            name, self.config, self.source, load=origin.load, reads=self.reads, attention=attention,
            pooler=self.needs_pooler, kind=self.kind,
        )  # fmt: skip
        self.feature_size = int(self.config.hidden_size)

    def go_on(self, name: str, input: InputSpec) -> None:
        """Take the weights of the run that was given in place of a pretrained model, if one was."""
        if self.run is not None:
            start_from_run(self, self.run, name=name, input=input, core=self.model.base_model)

    def blocks(self) -> list[Any]:
        """The embeddings, then the encoder's layers."""
        return parts(self.model.base_model)

    @property
    def n_tokens(self) -> int:
        """Positions that a sample has inside the model (of text: a guess)."""
        return 16

    def save_assets(self, folder: Path) -> None:
        """The model's `config.json`."""
        self.config.save_pretrained(folder)


class HuggingFaceImage(HuggingFaceEncoder):
    """An image encoder (ViT, DeiT, …).

    Args:
        input: what a sample looks like, given by the platform.
        pooling: feature: the `cls` token, or the `mean` of the patches.
        image_size: the model's height and width; None: the stream's (random weights) or the model's own (pretrained).
        freeze: see `clplatform.backbone.freeze`.

    Raises:
        ClplatformError: the model is not one for these images.
    """

    reads = "pixel_values"

    def __init__(
        self,
        *,
        input: InputSpec,
        name: str,
        config: dict[str, Any] | None,
        pretrained: str | None,
        package: str | None,
        pooling: Literal["cls", "mean"],
        image_size: Annotated[int, Ge(1)] | None,
        dropout: Annotated[float, Ge(0), Lt(1)] | None,
        attention: str,
        freeze: Policy,
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        require_modality(name, input, "image")
        assert input.shape is not None
        if pretrained is None:
            config = fit_images(config or {}, input.shape, image_size)
        super().__init__(
            name=name, config=config, pretrained=pretrained, package=package, dropout=dropout, attention=attention,
            load_weights=load_weights, assets=assets,
        )  # fmt: skip
        self.pooling = pooling
        own = pair(self.config.image_size)
        size = own if image_size is None or pretrained is None else pair(image_size)
        mean, std = self._normalisation(input)
        self.pixels = Pixels(mean=mean, std=std, channels=self.config.num_channels, size=size)
        # Position embeddings are interpolated where the images have another size than those of the pretraining.
        interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if interpolates and size != own else {}
        self._check(name, input.shape[0], resized=size != own)
        self.go_on(name, input)
        freeze_parts(self, freeze)

    def _normalisation(self, input: InputSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The pretrained model's (kept in its configuration from then on), else the stream's."""
        assert input.mean is not None and input.std is not None
        if self.source == "random":
            return input.mean, input.std
        if not hasattr(self.config, "image_mean"):
            if self.run is not None:  # a run's model that began with random weights: what it was trained on
                theirs: Any = run_input(require_run("", self.run))
                mean, std = theirs.mean, theirs.std
            else:  # of three colours where the model's folder tells nothing; a model of grey images has one channel
                mean, std = (values[: self.config.num_channels] for values in preprocessor(self.source))
            self.config.image_mean, self.config.image_std = mean, std
        return tuple(self.config.image_mean), tuple(self.config.image_std)

    def _check(self, name: str, channels: int, *, resized: bool) -> None:
        if channels not in (1, self.config.num_channels):
            raise ClplatformError(
                f"backbone={name} reads images of {self.config.num_channels} channels, the stream's have {channels}"
            )
        if self.n_tokens < 1:
            raise ClplatformError(
                f"backbone={name}: a patch of {self.config.patch_size} pixels is larger than the image "
                f"({self.pixels.size}); give backbone.image_size or backbone.config.patch_size"
            )
        if self.pooling == "cls" and not any(CLASS_TOKEN.search(n) for n, _ in self.model.named_parameters()):
            raise ClplatformError(
                f"backbone={name}: {type(self.model).__name__} has no class token; choose backbone.pooling=mean"
            )
        if resized:
            assert self.pixels.size is not None
            try:
                with torch.no_grad():
                    self({"pixel_values": torch.zeros(1, channels, *self.pixels.size)})
            except (ValueError, RuntimeError) as error:
                raise ClplatformError(
                    f"backbone.image_size={self.pixels.size}: the model cannot be given other sizes than "
                    f"{self.config.image_size} ({reason(error)})"
                ) from None

    @property
    def n_tokens(self) -> int:
        """Patches of an image."""
        assert self.pixels.size is not None
        sides = zip(self.pixels.size, pair(self.config.patch_size), strict=True)
        return math.prod(side // patch for side, patch in sides)

    def forward(self, batch: Batch) -> Tensor:
        """`pixel_values` [B, C, H, W] → features [B, D]."""
        hidden = self.model(pixel_values=self.pixels(batch["pixel_values"]), **self.options).last_hidden_state
        # The patches are last: after the class token, and DeiT's distillation token or registers.
        return hidden[:, 0] if self.pooling == "cls" else hidden[:, -self.n_tokens :].mean(1)


def pair(size: Any) -> tuple[int, int]:
    """Height and width, as configurations write them: one number or two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def fit_images(config: dict[str, Any], shape: tuple[int, int, int], image_size: int | None) -> dict[str, Any]:
    """Image size, channels and patch size for a stream's images, where neither `image_size` nor the configuration
    says them."""
    size = image_size or config.get("image_size")
    fitting_patch, fitting_size = fit_patches(max(pair(size)) if size else max(shape[1:]))
    return {
        **config,
        "num_channels": shape[0],
        "image_size": size or fitting_size,
        "patch_size": config.get("patch_size") or fitting_patch,
    }


class HuggingFaceText(HuggingFaceEncoder):
    """A text encoder (BERT, DistilBERT, MiniLM, …); with its output layer a masked language model.

    Args:
        input: what a sample looks like, given by the platform.
        pooling: feature: the first token (`cls`), the `mean` of the tokens that are not padding, or the model's `pooler`.
        freeze: see `clplatform.backbone.freeze`.
        problem: given by the platform: features are those of the text, or of each token.

    Raises:
        ClplatformError: the model is not one for these texts.
    """

    problems = frozenset({"classification", "token_classification", "question_answering", "masked_lm"})
    reads = "input_ids"

    def __init__(
        self,
        *,
        input: InputSpec,
        name: str,
        config: dict[str, Any] | None,
        pretrained: str | None,
        package: str | None,
        pooling: Literal["cls", "mean", "pooler"],
        dropout: Annotated[float, Ge(0), Lt(1)] | None,
        attention: str,
        freeze: Policy,
        problem: str = "classification",
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        require_modality(name, input, "text")
        self.kind = "masked_lm" if problem == "masked_lm" else "encoder"
        self.needs_pooler = pooling == "pooler" and problem == "classification"
        if pretrained is None:
            config = {**(config or {}), "vocab_size": input.vocab_size, "pad_token_id": input.pad_token_id}
        super().__init__(
            name=name, config=config, pretrained=pretrained, package=package, dropout=dropout, attention=attention,
            load_weights=load_weights, assets=assets,
        )  # fmt: skip
        self._check(name, input)
        self.go_on(name, input)
        self.pooling = pooling if problem == "classification" else "none"
        takes = inspect.signature(self.model.base_model.forward).parameters
        self.segments = "token_type_ids" in takes and getattr(self.config, "type_vocab_size", 0) > 1
        freeze_parts(self, freeze)

    def _check(self, name: str, input: InputSpec) -> None:
        assert input.vocab_size is not None and input.max_length is not None
        if input.vocab_size > self.config.vocab_size:
            raise ClplatformError(
                f"backbone={name} knows {self.config.vocab_size} tokens, the stream's tokenizer has {input.vocab_size}: "
                "use the tokenizer that belongs to the backbone"
            )
        longest = longest_text(self.model)
        if longest is not None and input.max_length > longest:
            raise ClplatformError(
                f"stream.max_length={input.max_length}: backbone={name} reads at most {longest} tokens"
            )

    @property
    def notes(self) -> list[str]:
        """What a run's record should say about the weights."""
        drawn = getattr(self.model, "drawn_output", [])
        what = f"backbone.pretrained={self.source} has no output layer for masked language modelling: it starts from random"
        return [f"{what} weights ({', '.join(drawn)})"] if drawn else []

    @property
    def projection(self) -> Any:
        """Features of tokens [B, T, D] → logits [B, T, V] as the masked language model itself has them."""
        return self._project

    def _project(self, features: Tensor) -> Tensor:
        return logits_of(self.model, features)

    def forward(self, batch: Batch) -> Tensor:
        """`input_ids` and `attention_mask` [B, T], of pairs perhaps `token_type_ids` → features [B, D], of tokens [B, T, D]."""
        mask = batch["attention_mask"]
        more = {"token_type_ids": batch["token_type_ids"]} if self.segments and "token_type_ids" in batch else {}
        output = self.model.base_model(input_ids=batch["input_ids"], attention_mask=mask, **more)
        if self.pooling == "pooler":
            return output.pooler_output
        hidden = output.last_hidden_state
        if self.pooling == "none":
            return hidden
        if self.pooling == "cls":
            return hidden[:, 0]
        weight = mask.to(hidden.dtype)[:, :, None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
