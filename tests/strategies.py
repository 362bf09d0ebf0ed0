"""Every strategy of `conf/strategy/`, made from its page with sizes for the tiny world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from clplatform.build import make
from clplatform.check.small import SMALL
from clplatform.config import conf_dir
from clplatform.strategy.base import Strategy
from clplatform.tuning.base import TUNED


def from_page(name: str, **changes: Any) -> Strategy:
    """The strategy of this page, with some values changed."""
    node = yaml.safe_load((conf_dir() / "strategy" / f"{name}.yaml").read_text())[name]
    return make({**node, **SMALL.get(name, {}), **changes})


def scenario_of(*names: str) -> str:
    """Where these strategies are at home: with task ids if one of them needs them."""
    needs_ids = any("task_ids" in from_page(name).needs for name in names)
    return "task_incremental" if needs_ids else "class_incremental"


def is_for_transformers(*names: str) -> bool:
    return any("transformer" in from_page(name).needs for name in names)


def needs_tuning(*names: str) -> bool:
    return any(from_page(name).needs & TUNED for name in names)


def _maker(name: str) -> Callable[[], dict[str, Strategy]]:
    return lambda: {name: from_page(name)}


NAMES = sorted(path.stem for path in (conf_dir() / "strategy").glob("*.yaml"))
# What stops and goes on in every way in the tests of resuming; each page does so in the conformance suite too.
STRATEGIES: dict[str, Callable[[], dict[str, Strategy]]] = {
    **{name: _maker(name) for name in ("finetuning", "replay", "ewc", "joint", "si", "gdumb", "bic", "packnet", "ncm")},
    "replay+lwf": lambda: {"replay": from_page("replay"), "lwf": from_page("lwf")},
    "replay+linear_probe": lambda: {"replay": from_page("replay"), "linear_probe": from_page("linear_probe")},
    "replay+seq_star": lambda: {"replay": from_page("replay"), "seq_star": from_page("seq_star")},
    "ewc online": lambda: {"ewc": from_page("ewc", online=True, gamma=0.9)},
    "mir by batch, at the optimizer's rate": lambda: {"mir": from_page("mir", update="batch", step=None)},
    "replay by herding": lambda: {"replay": from_page("replay", policy="herding")},
    "replay balanced, by batch": lambda: {"replay": from_page("replay", policy="class_balanced", update="batch")},
}
