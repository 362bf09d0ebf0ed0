"""Starting from the backbone of an earlier run: what was pre-trained here can be learned on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from clplatform.files import read_json
from clplatform.types import ClplatformError, InputSpec


def run_model(pretrained: str | None) -> Path | None:
    """The model folder of a run directory (or the folder itself); None: `pretrained` is something else."""
    if pretrained is None:
        return None
    for folder in (Path(pretrained).expanduser() / "model", Path(pretrained).expanduser()):
        if (folder / "clplatform.json").is_file():
            return folder
    return None


def require_run(name: str, pretrained: str) -> Path:
    """The model folder of a run.

    Raises:
        ClplatformError: there is none.
    """
    folder = run_model(pretrained)
    if folder is None:
        raise ClplatformError(
            f"backbone.pretrained={pretrained}: backbone={name} starts from the run of another one, and this is no finished "
            "run (it has no model/clplatform.json)"
        )
    return folder


def run_input(folder: Path) -> InputSpec:
    """What the samples of a run looked like, from its model folder."""
    return InputSpec.from_dict(read_json(folder / "clplatform.json")["stream"]["input"])


def start_from_run(
    backbone: Any, pretrained: str, *, name: str, input: InputSpec, core: nn.Module | None = None, n_added: int = 0,
    **settings: Any,
) -> None:  # fmt: skip
    """Load a run's backbone into this one.

    Where the run's model has learned more positions than are needed here, their first ones are taken; an output layer that
    it does not have (it was pre-trained for another problem) begins anew.

    Args:
        core: the part that every problem has; None: all but `projection`. The rest may begin anew.
        n_added: tokens that the stream may have added to the run's.
        settings: those of this backbone's page that must be the run's: sizes, and what the weights were trained for.

    Raises:
        ClplatformError: the run's backbone is another one, or its tokens are.
    """
    from safetensors.torch import load_file

    folder = require_run(name, pretrained)
    description = read_json(folder / "clplatform.json")
    theirs: dict[str, Any] = description["config"]["backbone"]
    for key, value in settings.items():
        if key in theirs and value != theirs[key]:
            raise ClplatformError(
                f"backbone.{key}={value}: the backbone of {pretrained} has {theirs[key]}; give "
                f"backbone.{key}={theirs[key]}"
            )
    read = run_input(folder)
    if input.modality != read.modality:
        raise ClplatformError(
            f"backbone.pretrained={pretrained}: the run has learned from {read.modality}s, and the stream is of {input.modality}s"
        )
    vocabulary = read.vocab_size
    if vocabulary is not None and input.vocab_size not in (vocabulary, vocabulary + n_added):
        raise ClplatformError(
            f"backbone.pretrained={pretrained}: the run's tokenizer has {vocabulary} tokens and the stream's "
            f"{input.vocab_size}; a stream that takes the backbone's tokenizer has the same"
        )
    weights = load_file(str(folder / "model.safetensors"))
    load_weights(
        backbone,
        {n.removeprefix("backbone."): w for n, w in weights.items() if n.startswith("backbone.")},
        pretrained,
        core,
    )


@torch.no_grad()
def load_weights(
    backbone: nn.Module, weights: dict[str, torch.Tensor], source: str, core: nn.Module | None = None
) -> None:
    """Copy weights by name; tied ones may be there under one of their names only."""
    prefix = getattr(
        core, "base_model_prefix", None
    )  # Hugging Face: a model with an output layer holds the core by this name
    if prefix is not None:
        theirs, ours = (
            any(n.startswith(f"model.{prefix}.") for n in names) for names in (weights, backbone.state_dict())
        )
        old, new = (f"model.{prefix}." if inside else "model." for inside in (theirs, ours))
        weights = {new + n.removeprefix(old) if n.startswith(old) else n: w for n, w in weights.items()}
    own = dict(backbone.named_parameters(remove_duplicate=False)) | dict(backbone.named_buffers())
    done: set[int] = set()
    for name, target in own.items():
        if name not in weights:
            continue
        found = weights[name]
        positions = ".position" in name and found.ndim == 2 and len(found) >= len(target)
        if found.shape != target.shape and not (positions and found.shape[1:] == target.shape[1:]):
            raise ClplatformError(
                f"backbone.pretrained={source}: {name} has shape {list(found.shape)} there and {list(target.shape)} here"
                + ("; give a stream.max_length that is not longer than the run's" if ".position" in name else "")
            )
        target.copy_(found[: len(target)] if positions else found)
        done.add(id(target))
    needed = {id(p) for p in (backbone if core is None else core).parameters()}
    needed -= {id(p) for n, p in backbone.named_parameters() if n.startswith("projection.") or ".pooler." in n}
    lacking = [n for n, t in own.items() if id(t) in needed - done]
    if lacking:
        raise ClplatformError(
            f"backbone.pretrained={source}: the run's model lacks {lacking[0]} and {len(lacking) - 1} other parts of this "
            "one: it is of another kind, or was trained with a tuning or a strategy that changes the backbone"
        )
