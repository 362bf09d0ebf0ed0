"""Configuration: where `conf/` is, and every check that can fail before anything is built."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import pydoc
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Le
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from clplatform.types import ClplatformError

# What the platform itself passes to the constructors of each group.
GIVEN = {
    "stream": {"tokenizer"},
    "backbone": {"input", "load_weights", "assets"},
    "head": {"feature_size"},
    "optimizer": {"params"},
    "scheduler": {"optimizer", "n_steps"},
}
# Keys of a page that are for the platform, not for the constructor: first what every page may have, then by group.
OURS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
EXTRA = {"stream": {"epochs"}, "backbone": {"lr"}}

# What a configuration that comes from somebody else (a saved run) may build.
TRUSTED = ("clplatform.", "torch.optim.", "avalanche.benchmarks.")

ROOT: dict[str, Any] = {
    "name": str,
    "seed": Annotated[int, Ge(0)],
    "batch_size": Annotated[int, Ge(1)],
    "eval_batch_size": Annotated[int, Ge(1)],
    "num_workers": Annotated[int, Ge(0)],
    "threads": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "label_smoothing": Annotated[float, Ge(0), Le(1)],
    "early_stopping": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "checkpoint": dict[str, Any],
}
CHECKPOINT: dict[str, Any] = {
    "every_n_batches": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "every_minutes": Annotated[float, Gt(0)] | None,  # type: ignore[operator]
}
GROUPS = ("stream", "backbone", "head", "strategy", "optimizer", "scheduler", "trainer", "tracking")


def conf_dir() -> Path:
    """`conf/`, inside an installed package or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def config_hash(*, _root_: DictConfig) -> str:
    """Identity of a job: a hash of its resolved configuration, without what cannot change its numbers."""
    values = {k: v for k, v in resolved(_root_).items() if k not in ("hydra", "tracking", "name", "checkpoint")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


OmegaConf.register_new_resolver("config_hash", config_hash, replace=True)


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, interpolations resolved, without Hydra's own part."""
    plain = OmegaConf.create({k: config._get_node(k) for k in config if k != "hydra"})
    values = OmegaConf.to_container(plain, resolve=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


# -- checks ----------------------------------------------------------------------------------------------------


def check(config: dict[str, Any], notices: list[str]) -> None:
    """Refuse a configuration that cannot run; drop what a sweep or a recipe left behind of other jobs.

    Args:
        config: resolved; strategies that have no target are removed from it.
        notices: what was dropped is appended here.

    Raises:
        ClplatformError: the first mistake found: what, where, and what to do.
    """
    unknown = sorted(set(config) - set(ROOT) - set(GROUPS) - {"experiment"})
    if unknown:
        raise ClplatformError(f"{unknown[0]}: there is no such setting{suggest(unknown[0], [*ROOT, *GROUPS])}")
    for key, kind in ROOT.items():
        if key in config:
            check_value(key, config[key], kind)
    for key, value in (config.get("checkpoint") or {}).items():
        if key not in CHECKPOINT:
            raise ClplatformError(f"checkpoint.{key}: there is no such setting{suggest(key, CHECKPOINT)}")
        check_value(f"checkpoint.{key}", value, CHECKPOINT[key])
    check_strategies(config, notices)
    check_trainer(config["trainer"])
    for group in ("stream", "backbone", "head", "optimizer", "scheduler", "tracking"):
        node = config.get(group)
        if not isinstance(node, dict) or "_target_" not in node:
            raise ClplatformError(f"{group}={node}: choose one of those that `clplatform list` shows")
        check_node(group, node, given=GIVEN.get(group, set()), extra=EXTRA.get(group, set()))
    for name, node in config["strategy"].items():
        check_node(f"strategy.{name}", node)


def check_strategies(config: dict[str, Any], notices: list[str]) -> None:
    """`strategy` must be one or more pages; entries without a target are ghosts of other jobs, or typos."""
    strategies = config.get("strategy")
    if not isinstance(strategies, dict) or not strategies:
        raise ClplatformError("strategy: none is chosen; plain fine-tuning is strategy=finetuning")
    pages = {p.stem for p in (conf_dir() / "strategy").glob("*.yaml")}
    for name in [n for n, node in strategies.items() if not (isinstance(node, dict) and "_target_" in node)]:
        if name not in pages:
            raise ClplatformError(
                f"strategy.{name}: there is no such strategy{suggest(name, pages)}; "
                "`clplatform list strategies` shows all"
            )
        notices.append(f"strategy.{name} is set but {name} is not among the strategies of this job: ignored")
        del strategies[name]
    if not strategies:
        raise ClplatformError("strategy: none is chosen; plain fine-tuning is strategy=finetuning")


def check_trainer(values: dict[str, Any]) -> None:
    import pytorch_lightning as pl

    check_arguments("trainer", pl.Trainer, values, given=set())
    epochs = values.get("max_epochs")
    if not isinstance(epochs, int) or epochs < 1:
        raise ClplatformError(f"trainer.max_epochs={epochs}: give a number of epochs, 1 or more")


def check_node(path: str, node: dict[str, Any], given: Iterable[str] = (), extra: Iterable[str] = ()) -> None:
    """Does the node's target exist, and do its keys and values fit the target's signature?"""
    try:
        target = find(str(node["_target_"]))
    except ClplatformError as error:
        raise ClplatformError(f"{path}._target_={error}") from error
    values = {k: v for k, v in node.items() if k not in OURS and k not in extra}
    check_arguments(path, target, values, given=set(given))


def find(target: str) -> Any:
    """The class or function with this dotted name.

    Raises:
        ClplatformError: there is none, or importing it fails.
    """
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise ClplatformError(f"{target}: importing it fails ({type(error.value).__name__}: {error.value})") from error
    if found is None:
        raise ClplatformError(f"{target}: there is no such class or function; give its full dotted name")
    return found


def check_arguments(path: str, target: Any, values: Mapping[str, Any], given: set[str]) -> None:
    """Check keyword arguments against a signature: names, what is missing, types and ranges."""
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = type_hints(target)
    for key, value in values.items():
        if key not in parameters or key in given:
            if open_ended and key not in given:
                continue
            raise ClplatformError(
                f"{path}.{key}: there is no such setting{suggest(key, set(parameters) - given - {'self'})}"
            )
        if value == "???":
            raise ClplatformError(f"{path}.{key} is missing: set it with {path}.{key}=<value>")
        if isinstance(value, dict) and "_target_" in value:
            check_node(f"{path}.{key}", value)
        elif key in hints:
            check_value(f"{path}.{key}", value, hints[key])
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and name not in values and name not in given:
            raise ClplatformError(f"{path}.{name} is missing: set it with {path}.{name}=<value>")


def type_hints(target: Any) -> dict[str, Any]:
    function = target if isinstance(target, types.FunctionType) else target.__init__
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:  # a library's annotations that cannot be evaluated: it checks itself
        return {}


def check_value(path: str, value: Any, kind: Any) -> None:
    """Is `value` of this type and in its range?"""
    try:
        adapter = TypeAdapter(kind, config=_pydantic_config(kind))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return  # a type that pydantic does not know: its constructor checks it
    try:
        adapter.validate_json(json.dumps(value))  # as JSON a list may be a tuple, as it must from YAML
    except ValidationError as error:
        told = [e["msg"] for e in error.errors() if "JsonOrPython" not in e["msg"]]  # of types that JSON does not know
        reasons = list(dict.fromkeys(message[0].lower() + message[1:] for message in told))
        raise ClplatformError(f"{path}={value}: {'; or '.join(reasons[:3])}") from None


def _pydantic_config(kind: Any) -> ConfigDict | None:
    # Dataclasses and typed dicts bring their own configuration.
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    try:
        TypeAdapter(kind, config=config)
    except PydanticUserError as error:
        if error.code == "type-adapter-config-unused":
            return None
        raise
    return config


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or what there is when nothing is near and there is little."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there is: {', '.join(names)}" if 0 < len(names) <= 25 else ""


def check_trust(config: dict[str, Any], trusted: tuple[str, ...] = ()) -> None:
    """Refuse a configuration from elsewhere that would build what is neither ours nor named as trusted."""
    allowed = (*TRUSTED, *trusted)
    for target in targets(config):
        if not target.startswith(allowed):
            raise ClplatformError(
                f"the run's configuration builds {target!r}, which is not part of clplatform; if you trust it, "
                f"allow it with trust={target.rsplit('.', 1)[0]!r}"
            )


def targets(value: Any) -> Iterable[str]:
    """Every `_target_` in a configuration."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield str(value["_target_"])
        for item in value.values():
            yield from targets(item)
    elif isinstance(value, list):
        for item in value:
            yield from targets(item)
