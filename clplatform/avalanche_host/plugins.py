"""Plugins from YAML nodes: by dotted name (`{_target_: avalanche.training.plugins.ReplayPlugin, mem_size: 200}`) or by
short name (`replay`, or with settings `{replay: {mem_size: 200}}`).

Two arguments are given by the host: `model`, and the optimizer of a `scheduler` that is a node with `_partial_: true`.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import avalanche.training.plugins as shipped
import avalanche.training.plugins.bic as bic
from avalanche.core import BasePlugin
from avalanche.models.packnet import PackNetPlugin
from avalanche.training.losses import ICaRLLossPlugin
from avalanche.training.supervised.expert_gate import _ExpertGatePlugin
from avalanche.training.supervised.icarl import _ICaRLPlugin
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from clplatform.signature import check_arguments, check_node, find, suggest, typed
from clplatform.types import ClplatformError, StreamInfo

Node = dict[str, Any] | str
# What is not for texts.
IMAGES_ONLY: dict[type[BasePlugin], str] = {
    shipped.RARPlugin: "it moves the pixels of stored samples",
    shipped.GenerativeReplayPlugin: "it generates images",
}
# What has no place on a backbone and a head of ours.
REFUSED: dict[type[BasePlugin], str] = {
    PackNetPlugin: "it prunes layers of its own kind (PackNetModel), which no backbone here is made of",
    _ExpertGatePlugin: "it trains AlexNets of its own (ExpertGate) in place of the backbone, and no strategy but "
    "ExpertGateStrategy has its settings",
}
ALIASES = {"si": "synapticintelligence"}
PATH = "strategy.avalanche.plugins"


def catalogue() -> dict[str, type[BasePlugin]]:
    """Every supervised plugin that Avalanche ships, by its class's name."""
    classes = [PackNetPlugin, ICaRLLossPlugin, _ICaRLPlugin, _ExpertGatePlugin]
    for value in vars(shipped).values():
        if inspect.isclass(value) and issubclass(value, BasePlugin) and value is not shipped.SupervisedPlugin:
            classes.append(value)
    return {c.__name__.lstrip("_"): c for c in classes}


def short_name(name: str) -> str:
    """`ReplayPlugin` → `replay`: how a name is looked up."""
    name = name.lower().replace("_", "").removesuffix("plugin")
    return ALIASES.get(name, name)


def make_plugins(nodes: list[Node], *, model: nn.Module, optimizer: Optimizer, texts: bool) -> list[Any]:
    """The plugins, in order.

    Raises:
        ClplatformError: there is no such plugin, its settings do not fit, or it cannot be hosted.
    """
    # Avalanche 0.6.0 gives PyTorch's scheduler an argument that it no longer takes.
    bic.MultiStepLR = _multi_step  # type: ignore[attr-defined]
    found = resolve(nodes, texts=texts)
    return [_make(f"{PATH}[{i}]", *found[i], model, optimizer) for i in range(len(nodes))]


def resolve(nodes: list[Node], *, texts: bool) -> list[tuple[Any, dict[str, Any]]]:
    """Class and settings of every node, checked; raises as `make_plugins`."""
    found = []
    for i, node in enumerate(nodes):
        path = f"{PATH}[{i}]"
        target, values = _find(node, path)
        if target in REFUSED:
            raise ClplatformError(f"{path}: {target.__name__.lstrip('_')} cannot be hosted: {REFUSED[target]}")
        if texts and target in IMAGES_ONLY:
            raise ClplatformError(
                f"{path}: {target.__name__} is not for texts: {IMAGES_ONLY[target]}; choose a stream of images"
            )
        _check(path, target, values)
        found.append((target, values))
    return found


def check_memories(found: list[tuple[Any, dict[str, Any]]], info: StreamInfo) -> None:
    """A plugin's memory must have room for a sample of every class.

    Args:
        found: class and settings of every plugin, of `resolve`.

    Raises:
        ClplatformError: there is less.
    """
    n_classes = len(info.class_names)
    for i, (target, values) in enumerate(found):
        name, size = _memory(target, values)
        if isinstance(size, int) and size < n_classes:
            raise ClplatformError(
                f"{PATH}[{i}].{name}={size} is smaller than the {n_classes} classes of stream={info.name}; give it "
                f"{n_classes} or more"
            )


def _memory(target: Any, values: dict[str, Any]) -> tuple[str, Any]:
    """The setting that says how many samples a plugin keeps in all, and its value; None: there is no such."""
    policy = values.get("storage_policy")
    if isinstance(policy, dict):
        return "storage_policy.max_size", policy.get("max_size")
    given = {n: p.default for n, p in inspect.signature(target).parameters.items()} | values
    if given.get("fixed_memory") is False:  # iCaRL's size is that of a class then
        return "", None
    name = "memory_size" if "memory_size" in given else "mem_size"
    return name, given.get(name)


def _check(path: str, target: Any, values: dict[str, Any]) -> None:
    partials = {name: value for name, value in values.items() if isinstance(value, dict) and value.get("_partial_")}
    check_arguments(path, target, values | dict.fromkeys(partials), given=_given(target))
    for name, value in partials.items():
        check_node(f"{path}.{name}", value, given={"optimizer"})


def _given(target: Any) -> set[str]:
    """Arguments that the host gives."""
    return {"model"} & set(inspect.signature(target).parameters)


def _make(path: str, target: Any, values: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> Any:
    from clplatform.build import make_nested

    arguments = {name: make_nested(value) for name, value in values.items()}
    if isinstance(arguments.get("scheduler"), partial):
        arguments["scheduler"] = arguments["scheduler"](optimizer)
    try:
        return target(**arguments, **dict.fromkeys(_given(target), model))
    except (AssertionError, TypeError, ValueError) as error:
        raise ClplatformError(f"{path}: {target.__name__} refuses its settings: {error}") from error


def _multi_step(*args: Any, verbose: bool = False, **settings: Any) -> MultiStepLR:
    return MultiStepLR(*args, **settings)


def _find(node: Node, path: str) -> tuple[Any, dict[str, Any]]:
    """Class and settings of a node."""
    if isinstance(node, dict) and "_target_" in node:
        target = find(str(node["_target_"]))
        if not hasattr(target, "before_training_exp"):
            raise ClplatformError(f"{path}._target_={node['_target_']}: not a plugin of Avalanche")
        return target, {key: value for key, value in node.items() if key != "_target_"}
    name, values = _named(node, path)
    known = {short_name(n): c for n, c in catalogue().items()}
    if short_name(name) not in known:
        hint = suggest(short_name(name), known)
        raise ClplatformError(
            f"{path}={name}: Avalanche ships no such plugin{hint}; it ships {', '.join(sorted(catalogue()))}"
        )
    return known[short_name(name)], values


def _named(node: Node, path: str) -> tuple[str, dict[str, Any]]:
    if isinstance(node, str):
        return node, {}
    if len(node) == 1:
        name, values = next(iter(node.items()))
        if values is None or isinstance(values, dict):
            return str(name), values or {}
    raise ClplatformError(f"{path}={typed(node)}: give a name, {{name: {{setting: value}}}} or a node with _target_")
