"""Configuration: where `conf/` is, and every check that can fail before anything is built."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import DictConfig, OmegaConf

from clplatform.prompting.task import check_tasks
from clplatform.signature import check_arguments, check_node, check_value, find, suggest, typed
from clplatform.types import ClplatformError

# What the platform itself passes to the constructors of each group.
GIVEN = {
    "stream": {"tokenizer"},
    "backbone": {"input", "problem", "load_weights", "assets"},
    "head": {"feature_size"},
    "optimizer": {"params"},
    "scheduler": {"optimizer", "n_steps"},
    "trainer": {
        "logger", "callbacks", "plugins", "enable_checkpointing", "enable_progress_bar", "enable_model_summary",
        "num_sanity_val_steps",
    },
}  # fmt: skip
# Keys of a page that are for the platform, not for the constructor.
EXTRA = {"stream": {"epochs", "blurry"}, "backbone": {"lr"}, "tuning": {"lr"}}

# What a configuration that comes from somebody else (a saved run) may build: what pages are for, not all of clplatform.
TRUSTED = (
    *(f"clplatform.{part}." for part in ("stream", "backbone", "tuning", "head", "strategy", "schedule", "tracking")),
    "torch.optim.",
    "avalanche.benchmarks.",
    # what strategy=avalanche is for
    *(f"avalanche.training.{part}." for part in ("plugins", "losses", "storage_policy")),
    *(f"avalanche.models.{part}" for part in ("NCMClassifier", "ncm_classifier.", "FeCAMClassifier", "fecam.")),
    "clplatform.avalanche_host.generator.",
)

ROOT: dict[str, Any] = {
    "name": str,
    "seed": Annotated[int, Ge(0)],
    "batch_size": Annotated[int, Ge(1)],
    "eval_batch_size": Annotated[int, Ge(1)],
    "num_workers": Annotated[int, Ge(0)],
    "threads": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "label_smoothing": Annotated[float, Ge(0), Le(1)],
    "references": bool,
    "bucket_by_length": bool,
    "tokenizer": str | None,
    "early_stopping": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "evaluate_every": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "evaluate_samples": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "keep_models": bool,
    "prompting": dict[str, Any] | None,
    "checkpoint": dict[str, Any],
    "budget": dict[str, Any],
    "updates": list[dict[str, Any]],
    "remembered": str | None,
}
# What a configuration of before there was the setting does not say.
LATER = {
    "references": False, "bucket_by_length": False, "evaluate_every": None, "evaluate_samples": None,
    "keep_models": False, "budget": {}, "prompting": None, "tokenizer": None, "updates": [], "remembered": None,
}  # fmt: skip
# All are null in a run whose experiences take epochs and whose strategies may keep what they want (`clplatform.budget`).
BUDGET: dict[str, Any] = {
    "steps": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "samples": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "flops": Annotated[float, Gt(0)] | None,  # type: ignore[operator]
    "seconds": Annotated[float, Gt(0)] | None,  # type: ignore[operator]
    "bytes": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
}
STREAM: dict[str, Any] = {"blurry": Annotated[float, Ge(0), Lt(1)] | None}  # type: ignore[operator]
CHECKPOINT: dict[str, Any] = {
    "every_n_batches": Annotated[int, Ge(1)] | None,  # type: ignore[operator]
    "every_minutes": Annotated[float, Gt(0)] | None,  # type: ignore[operator]
}
# What Lightning would take, and then train nothing, or fail in the middle.
TRAINER: dict[str, Any] = {
    "max_epochs": Annotated[int, Ge(1)],
    "max_steps": Literal[-1] | Annotated[int, Ge(1)],
    "accumulate_grad_batches": Annotated[int, Ge(1)],
    "gradient_clip_val": Annotated[float, Ge(0)] | None,  # type: ignore[operator]
    "limit_train_batches": Annotated[float, Gt(0)] | None,  # type: ignore[operator]
}
GROUPS = ("stream", "backbone", "tuning", "head", "strategy", "optimizer", "scheduler", "trainer", "tracking")
NONE_CHOSEN = "strategy: none is chosen; plain fine-tuning is strategy=finetuning"


def conf_dir() -> Path:
    """`conf/`, inside an installed package or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


# Settings that came later, and that change nothing where they are null: as a configuration of before.
ADDED_TO_STREAMS = {"augment", "blurry", "metric_key", "test_fraction"}
ADDED = {name: {"lr"} for name in ("adapters", "inf_lora", "lora_experts", "o_lora")}  # strategy → settings


def config_hash(*, _root_: DictConfig) -> str:
    """Identity of a job: `identity` of its resolved configuration."""
    return identity(resolved(_root_))


def identity(config: dict[str, Any]) -> str:
    """A hash of a configuration, without what cannot change a run's numbers."""
    without = ("tracking", "name", "checkpoint", "num_workers", "references")
    values = {k: v for k, v in untuned(config).items() if k not in without}
    if is_full(values):  # as a configuration of before there were other tunings
        values.pop("tuning", None)
    if not values.get("bucket_by_length"):  # as before there was a choice
        values.pop("bucket_by_length", None)
    if not values.get("evaluate_every"):  # numbers are the same with it: but who asks for it wants a run that has it
        values = {k: v for k, v in values.items() if k not in ("evaluate_every", "evaluate_samples")}
    for name in ("keep_models", "prompting", "tokenizer", "updates", "remembered"):
        if not values.get(name):
            values.pop(name, None)
    budget = {k: v for k, v in (values.pop("budget", None) or {}).items() if v is not None}
    values |= {"budget": budget} if budget else {}
    if isinstance(stream := values.get("stream"), dict):
        values["stream"] = {k: v for k, v in stream.items() if v is not None or k not in ADDED_TO_STREAMS}
    if isinstance(strategies := values.get("strategy"), dict):  # in the order typed; without ghosts, see `drop_ghosts`
        tries = set() if values.get("protocol") else {"_tune_"}  # what would be tried if it were tuned
        values["strategy"] = [
            [name, {k: v for k, v in node.items() if k not in tries and not (v is None and k in ADDED.get(name, ()))}]
            for name, node in strategies.items()
            if has_target(node)
        ]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def is_full(config: dict[str, Any]) -> bool:
    """Is the whole backbone trained?"""
    tuning = config.get("tuning")
    return tuning is None or (has_target(tuning) and tuning["_target_"] == "clplatform.tuning.full.Full")


def untuned(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as it was before `protocol=tune_first` has changed it."""
    protocol = config.get("protocol")
    if not protocol or "before" not in protocol:
        return config
    found = copy.deepcopy(config)
    for name, value in found["protocol"].pop("before").items():
        *path, key = name.split(".")
        node = found
        for part in path:
            node = node[part]
        node[key] = value
    for name in ("chosen", "selection"):
        found["protocol"].pop(name, None)
    return found


OmegaConf.register_new_resolver("config_hash", config_hash, replace=True)


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, interpolations resolved, without Hydra's own part."""
    plain = OmegaConf.create({k: config._get_node(k) for k in config if k != "hydra"})
    values = OmegaConf.to_container(plain, resolve=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


# -- checks ----------------------------------------------------------------------------------------------------


def check(config: dict[str, Any]) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: resolved.

    Raises:
        ClplatformError: the first mistake found: what, where, and what to do.
    """
    unknown = sorted(set(config) - set(ROOT) - set(GROUPS) - {"experiment", "protocol"})
    if unknown:
        raise ClplatformError(f"{unknown[0]}: there is no such setting{suggest(unknown[0], [*ROOT, *GROUPS])}")
    check_values("", {**LATER, **config}, ROOT)
    check_values("checkpoint.", config["checkpoint"], CHECKPOINT)
    check_values("budget.", {**dict.fromkeys(BUDGET), **config.get("budget", {})}, BUDGET)
    for part, known in (("checkpoint", CHECKPOINT), ("budget", BUDGET)):
        wrong = next((key for key in config.get(part, {}) if key not in known), None)
        if wrong is not None:
            raise ClplatformError(f"{part}.{wrong}: there is no such setting{suggest(wrong, known)}")
    if config.get("prompting") is not None:
        check_tasks(config["prompting"])
    check_strategies(config.get("strategy"))
    check_trainer(config.get("trainer"))
    for group in ("stream", "backbone", "tuning", "head", "optimizer", "scheduler", "tracking"):
        node = config.get(group)
        if node is None and group == "tuning":  # of before there were others than full
            continue
        if not has_target(node):
            if node == {"blurry": None}:  # what run.yaml says of every stream
                node = None
            raise ClplatformError(f"{group}={typed(node)}: choose one of those that `clplatform list` shows")
        check_node(group, node, given=GIVEN.get(group, set()), extra=EXTRA.get(group, set()))
    for node in config.get("updates", []):
        check_node("stream", node, given=GIVEN["stream"])
    check_values("stream.", {**dict.fromkeys(STREAM), **config["stream"]}, STREAM)
    for name, node in config["strategy"].items():
        check_node(f"strategy.{name}", node)


def check_values(prefix: str, values: dict[str, Any], kinds: dict[str, Any]) -> None:
    """Is each of these settings there, and right?"""
    for key, kind in kinds.items():
        if key not in values:
            raise ClplatformError(f"{prefix}{key} is missing: set it with {prefix}{key}=<value>")
        check_value(f"{prefix}{key}", values[key], kind)


def has_target(node: Any) -> TypeGuard[dict[str, Any]]:
    """Is this a page's node, which says what to build?"""
    return isinstance(node, dict) and "_target_" in node


def drop_ghosts(config: dict[str, Any], pages: Iterable[str], typed: Iterable[str]) -> list[str]:
    """Take out what a sweep or a recipe has set for strategies that this job does not have.

    Args:
        config: resolved; strategies without a target are removed from it.
        pages: names of all strategies that there are: others are typos, and are left for `check`.
        typed: the job's overrides.

    Returns:
        A notice for each that was typed: a recipe's settings of a strategy are for those who choose it.
    """
    strategies = config.get("strategy")
    if not isinstance(strategies, dict):
        return []
    known = set(pages)
    ghosts = [n for n, node in strategies.items() if isinstance(node, dict) and not has_target(node) and n in known]
    config["strategy"] = {name: node for name, node in strategies.items() if name not in ghosts}
    keys = [override.lstrip("+~") for override in typed]
    set_here = [n for n in ghosts if any(key.startswith((f"strategy.{n}.", f"strategy.{n}=")) for key in keys)]
    return [f"strategy.{name} is set but {name} is not among the strategies of this job: ignored" for name in set_here]


def check_strategies(strategies: Any) -> None:
    """`strategy` must be one or more pages."""
    if not isinstance(strategies, dict) or not strategies:
        raise ClplatformError(NONE_CHOSEN)
    if "_target_" in strategies:
        raise ClplatformError(
            f"strategy._target_={strategies['_target_']}: the page of a strategy has one key, the strategy's name, and "
            "under it _target_ and the settings"
        )
    for name, node in strategies.items():
        if has_target(node):
            continue
        known = {p.stem for p in (conf_dir() / "strategy").glob("*.yaml")}
        if not isinstance(node, dict) and name in known:
            raise ClplatformError(
                f"strategy.{name}={typed(node)}: {name} has settings, strategy.{name}.<setting>=<value>; "
                f"~strategy.{name} takes it out"
            )
        hint = suggest(name, known) or "; see `clplatform list strategies`"
        raise ClplatformError(f"strategy.{name}: there is no such strategy{hint}")


def check_trainer(values: Any) -> None:
    import pytorch_lightning as pl

    if not isinstance(values, dict):
        raise ClplatformError(f"trainer={typed(values)}: leave it at trainer=default")
    check_arguments("trainer", pl.Trainer, values, given=GIVEN["trainer"])
    check_values("trainer.", {"max_epochs": values.get("max_epochs")}, {"max_epochs": TRAINER["max_epochs"]})
    check_values("trainer.", values, {key: kind for key, kind in TRAINER.items() if key in values})


def check_trust(config: dict[str, Any], trusted: tuple[str, ...] = ()) -> None:
    """Refuse a configuration from elsewhere that would build what is neither ours nor named as trusted."""
    allowed = (*TRUSTED, *trusted)
    for target in targets(config):
        if not target.startswith(allowed):
            raise untrusted(target)
    for target in targets({k: v for k, v in config.items() if k not in ("stream", "tracking")}):  # what `load` builds
        found = find(target)
        # A module of ours imports others: `clplatform.strategy.replay.torch.load` begins well.
        origin = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
        if not origin.startswith(allowed):
            raise untrusted(origin)


def untrusted(target: str) -> ClplatformError:
    return ClplatformError(
        f"the run's configuration builds {target!r}, which is not part of clplatform; if you trust it, "
        f"allow it with trust={target.rpartition('.')[0]!r}"
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
