"""From a configuration, or from pretrained weights, to a Hugging Face model that can be a backbone.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from clplatform.backbone.pretrained import from_hub
from clplatform.types import ClplatformError

# How architectures name their dropout probabilities.
DROPOUT = re.compile(r"dropout(_prob|_rate)?$|_pdrop$")
# What it says of an implementation of attention that an architecture or a machine lacks.
ATTENTION = re.compile(r"attn_implementation|attention implementation|FlashAttention")
# What a model is needed for: who knows its architecture, and what one that is not known is not.
KINDS: dict[str, tuple[Any, str]] = {
    "encoder": (AutoModel, "no Transformer encoder with one size of features"),
    "masked_lm": (AutoModelForMaskedLM, "no masked language model"),
    "causal_lm": (AutoModelForCausalLM, "no causal language model"),
    "seq2seq": (AutoModelForSeq2SeqLM, "no encoder-decoder that writes"),
}
# What Hugging Face raises at a configuration that fits nothing.
REFUSALS = (ValueError, TypeError, ImportError, StrictDataclassError)


def configure(
    name: str, values: dict[str, Any], source: str, *, reads: str, kind: str = "encoder", assets: Path | None = None
) -> PretrainedConfig:
    """The configuration of a saved model (`assets`), of a pretrained one with some values changed, or of a new one.

    Args:
        reads: the model's input, `pixel_values` or `input_ids`.
        kind: of `KINDS`.

    Raises:
        ClplatformError: there is no such model, or it has no such setting.
    """
    if assets is not None:
        return AutoConfig.from_pretrained(assets, trust_remote_code=False)
    if source != "random":
        options = {**values, "trust_remote_code": False, "return_unused_kwargs": True}
        found: Any = from_hub("the model", source, lambda: AutoConfig.from_pretrained(source, **options))
        config, unknown = found
        check_keys(config, unknown)
        return config
    if "model_type" not in values:
        raise ClplatformError(f"backbone={name}: give backbone.pretrained, or backbone.config with a model_type")
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ClplatformError(f"backbone.config.model_type={model_type}: Hugging Face has no such model{hint}")
    try:
        standard: Any = CONFIG_MAPPING[model_type]()
        find_architecture(name, standard, reads, kind)
        check_keys(standard, values)
        return AutoConfig.for_model(**values)
    except REFUSALS as error:
        raise ClplatformError(f"backbone={name}: backbone.config is not a configuration ({reason(error)})") from None


def check_keys(known: PretrainedConfig, values: dict[str, Any]) -> None:
    """Refuse settings that this kind of model does not have: Hugging Face would keep them and ignore them."""
    for key in values:
        if not hasattr(known, key):
            near = difflib.get_close_matches(key, list(known.to_dict()), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ClplatformError(f"backbone.config.{key}: {type(known).__name__} has no such setting{hint}")


def set_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Set every dropout probability of a configuration."""
    for key, value in config.to_dict().items():
        if DROPOUT.search(key) and isinstance(value, int | float):
            setattr(config, key, dropout)


def make_model(
    name: str, config: PretrainedConfig, source: str, *, load: bool, reads: str, attention: str, pooler: bool = False,
    kind: str = "encoder",
) -> PreTrainedModel:  # fmt: skip
    """The model, with its own weights (`load`) or random ones.

    Args:
        reads: see `configure`.
        attention: implementation of attention (`sdpa`, `eager`, …).
        pooler: is its pooler needed?
        kind: of `KINDS`.

    Raises:
        ClplatformError: it cannot be built, or is not what a backbone must be.
    """
    architecture = find_architecture(name, config, reads, kind)
    options: dict[str, Any] = {"attn_implementation": attention}
    if "add_pooling_layer" in inspect.signature(architecture.__init__).parameters:
        options["add_pooling_layer"] = pooler
    try:
        if load:
            model = load_weights(architecture, config, source, options, new_output=kind == "masked_lm")
        else:
            model = architecture._from_config(config, dtype=torch.float32, **options)
    except REFUSALS as error:
        hint = "; choose another backbone.attention, such as eager" if ATTENTION.search(str(error)) else ""
        raise ClplatformError(f"backbone={name}: the model cannot be built ({reason(error)}){hint}") from None
    if pooler and getattr(model, "pooler", None) is None:
        raise ClplatformError(
            f"backbone={name}: {type(model).__name__} has no pooler; choose backbone.pooling=cls or mean"
        )
    return model


def find_architecture(name: str, config: PretrainedConfig, reads: str, kind: str = "encoder") -> type[PreTrainedModel]:
    """The model of a configuration: one whose features are a sequence of vectors of one size; of `KINDS` that write, with its
    output layer."""
    auto, what_not = KINDS[kind]
    found: Any = auto._model_mapping.get(type(config), None)
    architecture = found if isinstance(found, type) or found is None else found[0]
    what = {"pixel_values": "images", "input_ids": "text"}[reads]
    if kind == "encoder" and (architecture is None or architecture.main_input_name != reads):
        raise ClplatformError(f"backbone={name}: {config.model_type} is no model that reads {what}")
    one_size = isinstance(getattr(config, "hidden_size", None), int)
    if architecture is None or config.is_encoder_decoder != (kind == "seq2seq") or not one_size:
        raise ClplatformError(f"backbone={name}: {config.model_type} is {what_not}")
    return cast(type[PreTrainedModel], architecture)


def load_weights(
    architecture: type[PreTrainedModel], config: PretrainedConfig, source: str, options: dict[str, Any], *,
    new_output: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Pretrained weights, all of them.

    Args:
        new_output: may the weights lack the output layer? Then it is drawn, and `drawn_output` of the model names its
            parameters.

    Raises:
        ClplatformError: they cannot be had, or are not those of this model (Hugging Face would draw what is missing).
    """
    options = {**options, "dtype": torch.float32, "use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        loaded: Any = from_hub(
            "the model", source, lambda: architecture.from_pretrained(source, config=config, **options)
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if new_output:
        within = f"{architecture.base_model_prefix}."
        model.drawn_output = [key for key in missing if not key.startswith(within)]
        missing = [key for key in missing if key.startswith(within)]
    wrong = [(key, "lack") for key in missing]
    wrong += [(key, "have another size of") for key, *_ in sorted(report["mismatched_keys"])]
    if wrong:
        key, how = wrong[0]
        raise ClplatformError(
            f"backbone.pretrained={source}: the weights {how} {key} (and {len(wrong) - 1} others); they are not those of "
            "the model that its config.json and backbone.config describe"
        )
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, Hugging Face does not print what it found in a file of weights: it is checked instead."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def parts(model: Any) -> list[Any]:
    """The embeddings (as one part), then the layers: the longest of the outermost lists of modules."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    layers = max(outer, key=len, default=[])  # type: ignore[arg-type]
    embeddings = [m for n, m in model.named_children() if "embed" in n or isinstance(m, nn.Embedding)]
    return [nn.ModuleList(embeddings), *layers]


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens that a text may have; None: the positions of the architecture have no end."""
    longest = getattr(model.config, "max_position_embeddings", None)
    table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    first = getattr(table, "padding_idx", None)
    # RoBERTa and its kin number positions from the one after the padding's.
    return longest if longest is None or first is None else longest - first - 1


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return textwrap.shorten(str(error), 200, placeholder=" …")
