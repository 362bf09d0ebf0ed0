"""From what `encode.py` has encoded back to what plugins hold.

Objects of a freshly made plugin are filled in place, so that what two attributes share stays shared. Only classes and
functions of Avalanche, and a few of PyTorch's data loading, are made by name.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections import Counter, OrderedDict, defaultdict
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from avalanche.benchmarks.utils import concat_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clplatform.avalanche_host.encode import qualified, set_modes
from clplatform.avalanche_host.model import HostedModel
from clplatform.stream.avalanche import as_dataset
from clplatform.types import Batch, ClplatformError, ExperienceInfo

if TYPE_CHECKING:
    from clplatform.avalanche_host.facade import HostedStrategy

BY_NAME = ("avalanche.", "clplatform.stream.avalanche", "torch.utils.data.")
FACTORIES: dict[str | None, Any] = {"int": int, "float": float, "list": list, "dict": dict, "set": set}
EMPTY: dict[str, Any] = {
    "dict": dict, "ordered": OrderedDict, "default": defaultdict, "counter": Counter, "list": list, "set": set,
}  # fmt: skip
FIXED: dict[str, Any] = {"tuple": tuple, "frozenset": frozenset}


class Decoder:
    """Decodes one state. Method `_<type>` makes what has that type.

    Args:
        hosted: whose plugins it is of.
    """

    def __init__(self, hosted: HostedStrategy) -> None:
        self.hosted = hosted
        self.made: dict[int, Any] = {}  # by number
        self.filled: set[int] = set()  # ids of what was there and has been filled

    def decode(self, node: Any, there: Any = None) -> Any:
        """The value of a node; `there`: what a fresh plugin has in its place, which is filled where it can be."""
        if not isinstance(node, dict):
            return node
        if id(there) in self.filled:  # two places shared it, which no longer do
            there = None
        return getattr(self, f"_{node['type']}")(node, there)

    def keep(self, node: dict[str, Any], value: Any) -> Any:
        self.made[node["number"]] = value
        self.filled.add(id(value))
        return value

    # -- leaves --------------------------------------------------------------------------------------------------
    def _tensor(self, node: dict[str, Any], there: Any) -> Tensor:
        return node["value"].to(self.hosted.device)

    def _array(self, node: dict[str, Any], there: Any) -> Any:
        array = node["value"].numpy()
        return array[()] if node["scalar"] else array

    def _device(self, node: dict[str, Any], there: Any) -> torch.device:
        return self.hosted.device if node["value"] != "cpu" else torch.device("cpu")

    def _dtype(self, node: dict[str, Any], there: Any) -> Any:
        return getattr(torch, node["value"])

    def _kept(self, node: dict[str, Any], there: Any) -> Any:
        if there is None and node.get("name"):
            there = by_name(node["name"])
        return there

    def _size(self, node: dict[str, Any], there: Any) -> torch.Size:
        return torch.Size(node["value"])

    def _parameter(self, node: dict[str, Any], there: Any) -> nn.Parameter:
        module = self.hosted.model if node["of"] is None else self.made[node["of"]]
        return module.get_parameter(node["name"])

    def _same(self, node: dict[str, Any], there: Any) -> Any:
        return self.made[node["as"]]

    # -- containers ----------------------------------------------------------------------------------------------
    def _container(self, node: dict[str, Any], there: Any) -> Any:
        kind = EMPTY[node["type"]]
        fresh = defaultdict(FACTORIES.get(node["factory"])) if kind is defaultdict else kind()
        value = self.keep(node, there if type(there) is kind else fresh)
        before = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        items = {key: self.decode(item, before.get(key)) for key, item in node["items"].items()}
        value.clear()
        if isinstance(value, list):
            value.extend(items.values())
        else:
            value.update(items if isinstance(value, dict) else items.values())
        return value

    _dict = _ordered = _default = _counter = _list = _set = _container

    def _fixed(self, node: dict[str, Any], there: Any) -> Any:
        before = dict(enumerate(there)) if isinstance(there, tuple) else {}
        items = [self.decode(item, before.get(key)) for key, item in node["items"].items()]
        return FIXED[node["type"]](items)

    _tuple = _frozenset = _fixed

    def _iterator(self, node: dict[str, Any], there: Any) -> Any:
        return self.keep(node, iter(self.decode(node["items"])))

    # -- objects -------------------------------------------------------------------------------------------------
    def _object(self, node: dict[str, Any], there: Any) -> Any:
        if qualified(type(there)) != node["class"]:
            made = by_name(node["class"])
            there = made.__new__(made)
        self.keep(node, there)
        for name, field in node["fields"].items():
            before = vars(there).get(name)
            value = self.decode(field, before)
            if value is not before or name not in vars(there):
                vars(there)[name] = value
        return there

    def _dataset(self, node: dict[str, Any], there: Any) -> Any:
        if node["size"] == 0:
            return self.keep(node, concat_datasets([]))
        tasks = node["t"].unique().tolist()
        parts = [as_dataset(Stored(*(node[k][node["t"] == t] for k in "xy")), t, text=False) for t in tasks]  # type: ignore[arg-type]
        dataset = concat_datasets(parts)
        if len(tasks) > 1:  # back into their order
            order = torch.cat([(node["t"] == t).nonzero()[:, 0] for t in tasks])
            dataset = dataset.subset(order.argsort().tolist())
        return self.keep(node, dataset)

    def _copy(self, node: dict[str, Any], there: Any) -> HostedModel:
        learner = self.hosted.learner
        with torch.random.fork_rng(devices=[]):
            model = self.keep(node, copy.deepcopy(self.hosted.model))
            model.seen = [ExperienceInfo.from_dict(info) for info in node["seen"].values()]
            head: Any = learner.make_head()
            for info in model.seen:
                head.grow(info)
        model._modules["head"] = head.to(learner.device)
        model.eval_classifier = self.decode(node["eval_classifier"], model.eval_classifier)
        model.tail = tail_of(self.decode(node["tail"]))
        try:
            missing, unexpected = nn.Module.load_state_dict(model, node["weights"], strict=False)
        except RuntimeError as error:
            raise ClplatformError(
                f"strategy.avalanche: a plugin's copy of the model cannot be restored: {error}"
            ) from None
        assert not unexpected
        assert all(name.startswith("eval_classifier.") for name in missing), missing
        for name, value in node["attributes"].items():
            vars(model)[name] = self.decode(value, vars(model).get(name))
        set_modes(model, node)
        return model

    def _module(self, node: dict[str, Any], there: Any) -> nn.Module:
        if qualified(type(there)) != node["class"]:
            there = self._like(node)
        self.keep(node, there)
        parts = dict(there.named_modules())
        for name, saved in node["parts"].items():
            part = parts[name]
            for key, value in saved["parameters"].items():
                _set_parameter(part, key, value, self.hosted.device)
            for key, value in saved["buffers"].items():
                part._buffers[key] = None if value is None else value.to(self.hosted.device)
            for key, value in saved["attributes"].items():
                vars(part)[key] = self.decode(value, vars(part).get(key))
        set_modes(there, node)
        return there

    def _like(self, node: dict[str, Any]) -> nn.Module:
        """A module of this class: a copy of another that the plugin has, or an empty one if it has no parts."""
        for other in self.made.values():
            if isinstance(other, nn.Module) and qualified(type(other)) == node["class"]:
                return copy.deepcopy(other)
        made = by_name(node["class"])
        if list(node["parts"]) != [""]:
            raise ClplatformError(f"strategy.avalanche: a plugin's {made.__name__} cannot be restored")
        module = made.__new__(made)
        nn.Module.__init__(module)
        return module

    def _stateful(self, node: dict[str, Any], there: Any) -> Any:
        there.load_state_dict(self.decode(node["state"]))
        return self.keep(node, there)

    def _loader(self, node: dict[str, Any], there: Any) -> DataLoader:
        return self.keep(node, DataLoader(**{k: self.decode(v) for k, v in node["settings"].items()}))

    def _generator(self, node: dict[str, Any], there: Any) -> Any:
        arguments = {name: self.decode(value) for name, value in node["arguments"].items()}
        function = by_name(node["function"])
        if not inspect.isgeneratorfunction(function):
            raise ClplatformError(f"strategy.avalanche: {node['function']}, which a plugin holds, cannot be restored")
        return self.keep(node, function(**arguments))


class Stored:
    """Samples x [N, …], y [N] as data."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.labels = x, y

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, rows: Tensor) -> Batch:
        return {"pixel_values": self.x[rows], "labels": self.labels[rows]}


def _set_parameter(part: nn.Module, name: str, value: Tensor | None, device: torch.device) -> None:
    old = part._parameters.get(name)
    if old is not None and value is not None and old.shape == value.shape:
        old.data.copy_(value)
    else:
        part._parameters[name] = None if value is None else nn.Parameter(value.to(device))


def tail_of(modules: list[nn.Module]) -> nn.Module:
    """See `HostedModel.tail`."""
    return nn.Sequential(*modules) if modules else nn.Identity()


def by_name(name: str) -> Any:
    """A class or function of Avalanche's, `module:qualified name`."""
    if name in ("torch:zeros", "torch:ones"):
        return getattr(torch, name.partition(":")[2])
    module, _, rest = name.partition(":")
    found = None
    if f"{module}.".startswith(BY_NAME):
        with contextlib.suppress(ImportError, AttributeError):
            found = reduce(getattr, rest.split("."), importlib.import_module(module))
    # Its own name, too: Avalanche's modules import others, and `avalanche.…:os.system` begins well.
    if found is None or getattr(found, "__module__", None) != module or qualified(found) != name:
        raise ClplatformError(f"strategy.avalanche: {name}, which a plugin holds, cannot be restored")
    return found
