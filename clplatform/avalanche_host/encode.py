"""What plugins hold in their attributes, as tensors and plain values that are saved without pickling.

Encoded are numbers, texts, tensors, arrays, containers, Avalanche's own objects (by class and attributes), datasets (by
their samples), copies of the model (by weights and the experiences that their structure comes from), other modules,
schedulers, data loaders, and generators that have not started (by function and arguments). What was given to a plugin
and does not change (functions, loggers) is kept. The rest, such as a generator that has begun, cannot be saved.
`decode.py` is the way back.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections import Counter, OrderedDict, defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.benchmarks.utils.data import AvalancheDataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, RandomSampler, default_collate

from clplatform.avalanche_host.model import HostedModel

if TYPE_CHECKING:
    from clplatform.avalanche_host.facade import HostedStrategy

PLAIN = (bool, int, float, str, type(None))
CONTAINERS: dict[type, str] = {
    dict: "dict", OrderedDict: "ordered", defaultdict: "default", Counter: "counter", list: "list", tuple: "tuple",
    set: "set", frozenset: "frozenset",
}  # fmt: skip
# Given to a plugin, never changed by it.
KEPT = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type, partial, logging.Logger, CLExperience)
LIVE = type(iter([]))


NAMED = (types.FunctionType, types.BuiltinFunctionType, type)
TRAINING_ONLY = (AvalancheDataset, HostedModel, DataLoader, types.GeneratorType, LIVE)


class Encoder:
    """Encodes values that may share parts.

    Args:
        hosted: whose plugins they are of.
        samples: read the samples of datasets (slow); otherwise only their number.
        training: what training alone needs too: samples and copies of the model.

    Attributes:
        unsaved: paths of what cannot be saved.
    """

    def __init__(self, hosted: HostedStrategy, *, samples: bool = True, training: bool = True) -> None:
        self.hosted, self.samples, self.training = hosted, samples, training
        self.unsaved: list[str] = []
        self.numbers: dict[int, int] = {}
        self.alive: list[Any] = []  # an id is used again when its object is gone
        self.parameters: dict[int, dict[str, Any]] = {}  # of modules, by id
        self._know(hosted.model, None)

    def encode(self, value: Any, path: str) -> Any:
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, nn.Parameter) and id(value) in self.parameters:
            return self.parameters[id(value)]
        if isinstance(value, Tensor):
            return value.detach() if value.device.type == "cpu" else {"type": "tensor", "value": value.detach()}
        if isinstance(value, np.ndarray | np.generic):
            return {
                "type": "array",
                "value": torch.from_numpy(np.array(value)),
                "scalar": isinstance(value, np.generic),
            }
        if isinstance(value, torch.device | torch.dtype):
            return {"type": type(value).__name__, "value": str(value).removeprefix("torch.")}
        if isinstance(value, torch.Size):
            return {"type": "size", "value": list(value)}
        if isinstance(value, KEPT):
            return {"type": "kept", "name": qualified(value) if isinstance(value, NAMED) else None}
        if isinstance(value, tuple | frozenset) and type(value) in CONTAINERS:
            return self._container(value, path) or self._cannot(path)
        if value is self.hosted or value is self.hosted.model or value is self.hosted.optimizer:
            return {"type": "kept"}
        if id(value) in self.numbers:
            return {"type": "same", "as": self.numbers[id(value)]}
        number = self.numbers[id(value)] = len(self.numbers)
        self.alive.append(value)
        node = self._shared(value, path)
        return {**(node or self._cannot(path)), "number": number}

    def _cannot(self, path: str) -> dict[str, Any]:
        self.unsaved.append(path)
        return {"type": "unsaved"}

    def _shared(self, value: Any, path: str) -> dict[str, Any] | None:
        """What may occur twice; None: it cannot be saved."""
        if type(value) in CONTAINERS:
            return self._container(value, path)
        if isinstance(value, dict | list | tuple | set):  # a kind of its own
            return None
        if not self.training and isinstance(value, TRAINING_ONLY):
            return {"type": "kept"}
        if isinstance(value, AvalancheDataset):
            return {"type": "dataset", "size": len(value), **(samples(value) if self.samples else {})}
        if isinstance(value, HostedModel):
            return self._copy(value, path)
        if isinstance(value, nn.Module):
            return self._module(value, path)
        if isinstance(value, Optimizer | LRScheduler):
            return {"type": "stateful", "state": self.encode(value.state_dict(), path)}
        if isinstance(value, DataLoader):
            return self._loader(value, path)
        if isinstance(value, types.GeneratorType):
            return self._generator(value, path)
        if isinstance(value, LIVE):
            reduced: Any = value.__reduce__()
            (items,), position = reduced[1], reduced[2] if len(reduced) > 2 else 0
            return {"type": "iterator", "items": self.encode(list(items)[position:], path)}
        if hasattr(value, "__dict__"):
            path = type(value).__name__ if path.startswith("plugins[") else path  # as the user knows it
            return {"type": "object", "class": qualified(type(value)), "fields": self.fields(vars(value), path)}
        return None

    def fields(self, values: dict[str, Any], path: str) -> dict[str, Any]:
        return {name: self.encode(value, f"{path}.{name}") for name, value in values.items()}

    def _container(self, value: Any, path: str) -> dict[str, Any] | None:
        items = dict(enumerate(value)) if not isinstance(value, dict) else value
        items = {int(k) if isinstance(k, np.integer) else k: v for k, v in items.items()}
        if not all(isinstance(key, PLAIN) for key in items):
            return None
        node = {"type": CONTAINERS[type(value)], "items": {k: self.encode(v, f"{path}[{k}]") for k, v in items.items()}}
        if isinstance(value, defaultdict):
            node["factory"] = getattr(value.default_factory, "__name__", None)
        return node

    def _copy(self, model: HostedModel, path: str) -> dict[str, Any]:
        return {
            "type": "copy",
            "seen": {i: info.to_dict() | {"classes": list(info.classes)} for i, info in enumerate(model.seen)},
            "weights": {n: t for n, t in model.state_dict().items() if not n.startswith("eval_classifier.")},
            "eval_classifier": self.encode(model.eval_classifier, f"{path}.eval_classifier"),
            "tail": self.encode(list(model.tail.children()), f"{path}.tail"),
            "attributes": self.fields(model.attributes(), path),
            **modes(model),
        }

    def _know(self, module: nn.Module, number: int | None) -> None:
        for name, parameter in module.named_parameters():
            self.parameters[id(parameter)] = {"type": "parameter", "of": number, "name": name}

    def _module(self, module: nn.Module, path: str) -> dict[str, Any]:
        self._know(module, self.numbers[id(module)])
        parts = {}
        for name, part in module.named_modules():
            own = {k: v for k, v in vars(part).items() if k[0] != "_" and isinstance(v, dict | list | int | np.integer)}
            parts[name] = {
                "parameters": {k: None if p is None else p.detach() for k, p in part._parameters.items()},
                "buffers": dict(part._buffers),
                "attributes": self.fields(own, f"{path}.{name}"),
            }
        return {"type": "module", "class": qualified(type(module)), "parts": parts, **modes(module)}

    def _loader(self, loader: DataLoader, path: str) -> dict[str, Any]:
        settings = {
            "dataset": loader.dataset,
            "batch_size": loader.batch_size,
            "shuffle": isinstance(loader.sampler, RandomSampler),
            "drop_last": loader.drop_last,
            "num_workers": loader.num_workers,
            "collate_fn": loader.collate_fn,
        }
        return {"type": "loader", "settings": self.fields(settings, path)}

    def _generator(self, value: types.GeneratorType, path: str) -> dict[str, Any] | None:
        if inspect.getgeneratorstate(value) != inspect.GEN_CREATED:
            return None
        frame: Any = value.gi_frame
        name = f"{frame.f_globals['__name__']}:{value.__qualname__}"
        return {"type": "generator", "function": name, "arguments": self.fields(frame.f_locals, path)}


def qualified(value: Any) -> str:
    """`module:name` of a class or function."""
    builtin = isinstance(value, types.BuiltinFunctionType)
    return f"{value.__module__}:{value.__name__ if builtin else value.__qualname__}"


def samples(dataset: AvalancheDataset) -> dict[str, Any]:
    """All samples of a dataset: x [N, …], y [N], t [N]."""
    if len(dataset) == 0:
        return {}
    x, y, t = default_collate([dataset[i] for i in range(len(dataset))])
    return {"x": x, "y": y, "t": t}


def modes(module: nn.Module) -> dict[str, Any]:
    """Which parts are in eval mode, and which parameters are frozen."""
    return {
        "eval": dict(enumerate(n for n, m in module.named_modules() if not m.training)),
        "frozen": dict(enumerate(n for n, p in module.named_parameters() if not p.requires_grad)),
    }


def set_modes(module: nn.Module, node: dict[str, Any]) -> None:
    """Inverse of `modes`."""
    in_eval, frozen = set(node["eval"].values()), set(node["frozen"].values())
    for name, part in module.named_modules():
        part.training = name not in in_eval
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
