"""Any Hugging Face encoder of images or text, from a configuration (random weights) or from pretrained weights.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from clplatform.backbone.fit import fit_patches, require_modality
from clplatform.backbone.freeze import Freezable, Policy, freeze_parts
from clplatform.backbone.pixels import Pixels
from clplatform.backbone.pretrained import from_hub, resolve_pretrained
from clplatform.types import Batch, ClplatformError, InputSpec

# Names under which architectures keep their dropout probabilities.
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


class HuggingFaceEncoder(Freezable):
    """What image and text encoders share.

    Args:
        name: for reports.
        config: of a model with random weights: `model_type` and what its configuration class takes.
        pretrained: folder or hub id; then `config` only overrides.
        package: see `resolve_pretrained`.
        dropout: sets every dropout probability; None: as configured.
        attention: implementation of attention (`sdpa`, `eager`, …).
        load_weights: False builds the architecture only.
        assets: folder with the `config.json` of a saved model.
    """

    def __init__(
        self, *, name: str, config: dict[str, Any] | None, pretrained: str | None, package: str | None,
        dropout: float | None, attention: str, load_weights: bool, assets: Path | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.source = "random" if pretrained is None else resolve_pretrained(pretrained, package)
        self.config = self._configure(name, config or {}, assets)
        for key in DROPOUTS:
            if dropout is not None and hasattr(self.config, key):
                setattr(self.config, key, dropout)
        self.model = self._make(load_weights and self.source != "random", attention)
        self.feature_size = int(self.config.hidden_size)

    def _configure(self, name: str, config: dict[str, Any], assets: Path | None) -> PretrainedConfig:
        if assets is not None:
            return AutoConfig.from_pretrained(assets, trust_remote_code=False)
        if self.source != "random":
            return from_hub(
                "the model",
                self.source,
                lambda: AutoConfig.from_pretrained(self.source, trust_remote_code=False, **config),
            )
        if "model_type" not in config:
            raise ClplatformError(f"backbone={name}: give backbone.pretrained, or backbone.config with a model_type")
        try:
            return AutoConfig.for_model(**config)
        except (ValueError, TypeError) as error:
            raise ClplatformError(f"backbone={name}: backbone.config is not a configuration ({error})") from None

    def _make(self, load: bool, attention: str) -> PreTrainedModel:
        options: dict[str, Any] = {"attn_implementation": attention}
        architecture: Any = AutoModel._model_mapping[type(self.config)]  # type: ignore[attr-defined]
        if not isinstance(architecture, type):
            architecture = architecture[0]
        if "add_pooling_layer" in inspect.signature(architecture.__init__).parameters:
            options["add_pooling_layer"] = self.needs_pooler
        if not load:
            return architecture._from_config(self.config, dtype=torch.float32, **options)
        return from_hub(
            "the model",
            self.source,
            lambda: architecture.from_pretrained(
                self.source, config=self.config, dtype=torch.float32, use_safetensors=True, **options
            ),
        )

    needs_pooler = False

    def blocks(self) -> list[Any]:
        """The embeddings, then the encoder's layers."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        layers = max(lists, key=len, default=[])  # type: ignore[arg-type]
        embeddings = [m for n, m in self.model.named_children() if "embed" in n]
        return [*embeddings[:1], *layers]

    @property
    def n_tokens(self) -> int:
        """Positions that a sample has inside the model (of text: a guess)."""
        patch = getattr(self.config, "patch_size", None)
        if not patch:
            return 16
        sides = [(size, size) if isinstance(size, int) else size for size in (self.config.image_size, patch)]
        return (sides[0][0] // sides[1][0]) * (sides[0][1] // sides[1][1])

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
    """

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
        assert input.shape is not None and input.mean is not None and input.std is not None
        if pretrained is None:
            config = fit_images({"image_size": image_size, **(config or {})}, input.shape)
        super().__init__(
            name=name, config=config, pretrained=pretrained, package=package, dropout=dropout, attention=attention,
            load_weights=load_weights, assets=assets,
        )  # fmt: skip
        self.pooling = pooling
        mean, std = self._normalisation(input)
        size = self.config.image_size
        self.pixels = Pixels(
            mean=mean,
            std=std,
            channels=self.config.num_channels,
            size=(size, size) if isinstance(size, int) else tuple(size),
        )
        freeze_parts(self, freeze)

    def _normalisation(self, input: InputSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The pretrained model's (kept in its configuration from then on), else the stream's."""
        if self.source != "random" and not hasattr(self.config, "image_mean"):
            path = Path(self.source) / "preprocessor_config.json"
            values = json.loads(path.read_text()) if path.is_file() else {}
            self.config.image_mean = values.get("image_mean", [0.5] * 3)
            self.config.image_std = values.get("image_std", [0.5] * 3)
        assert input.mean is not None and input.std is not None
        return tuple(getattr(self.config, "image_mean", input.mean)), tuple(
            getattr(self.config, "image_std", input.std)
        )

    def forward(self, batch: Batch) -> Tensor:
        """`pixel_values` [B, C, H, W] → features [B, D]."""
        hidden = self.model(pixel_values=self.pixels(batch["pixel_values"])).last_hidden_state
        return hidden[:, 0] if self.pooling == "cls" else hidden[:, 1:].mean(1)


def fit_images(config: dict[str, Any], shape: tuple[int, int, int]) -> dict[str, Any]:
    """Image size, channels and patch size for a stream's images, where the configuration leaves them open."""
    channels, height, width = shape
    config = {**config, "num_channels": channels}
    if config.get("image_size") and config.get("patch_size"):
        return config
    patch, size = fit_patches(config.get("image_size") or max(height, width))
    return {
        **config,
        "image_size": config.get("image_size") or size,
        "patch_size": config.get("patch_size") or patch,
    }


class HuggingFaceText(HuggingFaceEncoder):
    """A text encoder (BERT, DistilBERT, MiniLM, …).

    Args:
        input: what a sample looks like, given by the platform.
        pooling: feature: the first token (`cls`), the `mean` of the tokens that are not padding, or the model's `pooler`.
        freeze: see `clplatform.backbone.freeze`.
    """

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
        load_weights: bool = True,
        assets: Path | None = None,
    ) -> None:
        require_modality(name, input, "text")
        self.needs_pooler = pooling == "pooler"
        if pretrained is None:
            config = {**(config or {}), "vocab_size": input.vocab_size, "pad_token_id": input.pad_token_id}
        super().__init__(
            name=name, config=config, pretrained=pretrained, package=package, dropout=dropout, attention=attention,
            load_weights=load_weights, assets=assets,
        )  # fmt: skip
        self._check(name, input)
        self.pooling = pooling
        freeze_parts(self, freeze)

    def _check(self, name: str, input: InputSpec) -> None:
        assert input.vocab_size is not None and input.max_length is not None
        if input.vocab_size > self.config.vocab_size:
            raise ClplatformError(
                f"backbone={name} knows {self.config.vocab_size} tokens, the stream's tokenizer has {input.vocab_size}: "
                "use the tokenizer that belongs to the backbone"
            )
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest is not None and input.max_length > longest:
            raise ClplatformError(
                f"stream.max_length={input.max_length}: backbone={name} reads at most {longest} tokens"
            )

    def forward(self, batch: Batch) -> Tensor:
        """`input_ids` and `attention_mask` [B, T] → features [B, D]."""
        mask = batch["attention_mask"]
        output = self.model(input_ids=batch["input_ids"], attention_mask=mask)
        if self.pooling == "pooler":
            return output.pooler_output
        hidden = output.last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weight = mask.to(hidden.dtype)[:, :, None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
