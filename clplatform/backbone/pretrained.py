"""Where pretrained weights come from: a local folder, an installed package that carries them, or the hub."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from clplatform.types import ClplatformError


def resolve_pretrained(pretrained: str, package: str | None = None) -> str:
    """A local folder where there is one, else the hub's id.

    Args:
        pretrained: a folder in Hugging Face format, or an id of the hub.
        package: an installed Python package whose `get_model_path()` names a folder with the same weights.

    Raises:
        ClplatformError: it looks like a folder, but is none.
    """
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ClplatformError(
                f"backbone.pretrained={pretrained}: the folder has no config.json (Hugging Face format)"
            )
        return str(folder)
    if pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1:
        raise ClplatformError(f"backbone.pretrained={pretrained}: there is no such folder")
    root = os.environ.get("CLPLATFORM_MODELS")
    if root and (Path(root) / pretrained / "config.json").is_file():
        return str(Path(root) / pretrained)
    if package and importlib.util.find_spec(package):
        return str(importlib.import_module(package).get_model_path())
    return pretrained


def tokenizer_source(backbone: dict[str, Any]) -> str | None:
    """Where the tokenizer of a configured text backbone comes from, before it is built; None: it brings none."""
    pretrained = backbone.get("pretrained")
    return resolve_pretrained(pretrained, backbone.get("package")) if pretrained else None


def from_hub(what: str, source: str, load: Any) -> Any:
    """Call `load()`, and say what to do when neither the hub nor its cache has it.

    Raises:
        ClplatformError: it cannot be had.
    """
    try:
        return load()
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise ClplatformError(f"backbone.pretrained={source}: {what} cannot be loaded ({error})") from error
        raise ClplatformError(
            f"backbone.pretrained={source}: {what} is neither cached nor to be had from the hub; give a local folder "
            "with backbone.pretrained=<folder> (config.json, model.safetensors, tokenizer.json), or put it into "
            f"$CLPLATFORM_MODELS/{source}"
        ) from error
