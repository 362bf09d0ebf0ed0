"""Every strategy of `conf/strategy/`, made from its page with sizes for the tiny world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from clplatform.build import make
from clplatform.config import conf_dir
from clplatform.strategy.base import Strategy

# What the tiny world needs to be changed on a page.
TINY: dict[str, dict[str, Any]] = {
    "replay": {"capacity": 20},
    "a_gem": {"capacity": 20},
    "gem": {"capacity": 20},
    "icarl": {"capacity": 20},
    "bic": {"capacity": 20, "epochs": 5},
    "der": {"capacity": 20},
    "derpp": {"capacity": 20},
    "er_ace": {"capacity": 20},
    "mir": {"capacity": 20, "step": 0.1},
    "gdumb": {"capacity": 20, "epochs": 3},
    "cls_er": {"capacity": 20, "plastic_decay": 0.5, "stable_decay": 0.8, "plastic_rate": 0.9, "stable_rate": 0.7},
    "ema_teacher": {"strength": 1.0, "temperature": 2.0, "decay": 0.5},
    "ewc": {"samples": 16, "strength": 100.0},
    "lora_experts": {"rank": 2},
    "o_lora": {"rank": 2},
    "inf_lora": {"rank": 8, "scale": 8.0},
    "adapters": {"bottleneck": 20},
    "avalanche": {"plugins": [{"replay": {"mem_size": 20}}]},
    "rwalk": {"interval": 7},
    "ranpac": {"size": 50},
    "linear_probe": {"lr": None},
    "seq_star": {"warm_up": 2, "classifier_lr": None},
    "packnet": {"prune": 0.5, "retrain_epochs": 2},
    "ogd": {"samples": 8},
    "der_net": {"capacity": 20, "epochs": 3},
    "hat": {"first": "adapter", "adapter_lr": 0.01},  # position embeddings would swamp words that come later
    "l2p": {"pool": 6, "length": 2, "choose": 2, "features": "backbone", "mask": False, "lr": None},
    "dualprompt": {"g_layers": [1], "g_length": 2, "e_layers": [1], "e_length": 3, "mask": False, "lr": None},
    "coda_prompt": {"layers": [1], "components": 3, "length": 2, "lr": None},
    "progressive_prompts": {"length": 3, "hidden": 8, "lr": None},
}


def from_page(name: str, **changes: Any) -> Strategy:
    """The strategy of this page, with some values changed."""
    node = yaml.safe_load((conf_dir() / "strategy" / f"{name}.yaml").read_text())[name]
    return make({**node, **TINY.get(name, {}), **changes})


def scenario_of(*names: str) -> str:
    """Where these strategies are at home: with task ids if one of them needs them."""
    needs_ids = any("task_ids" in from_page(name).needs for name in names)
    return "task_incremental" if needs_ids else "class_incremental"


def is_for_transformers(*names: str) -> bool:
    return any("transformer" in from_page(name).needs for name in names)


def _maker(name: str) -> Callable[[], dict[str, Strategy]]:
    return lambda: {name: from_page(name)}


NAMES = sorted(path.stem for path in (conf_dir() / "strategy").glob("*.yaml"))
STRATEGIES: dict[str, Callable[[], dict[str, Strategy]]] = {
    **{name: _maker(name) for name in NAMES},
    "replay+lwf": lambda: {"replay": from_page("replay"), "lwf": from_page("lwf")},
    "replay+linear_probe": lambda: {"replay": from_page("replay"), "linear_probe": from_page("linear_probe")},
    "replay+seq_star": lambda: {"replay": from_page("replay"), "seq_star": from_page("seq_star")},
    "ewc online": lambda: {"ewc": from_page("ewc", online=True, gamma=0.9)},
    "mir by batch, at the optimizer's rate": lambda: {"mir": from_page("mir", update="batch", step=None)},
    "replay by herding": lambda: {"replay": from_page("replay", policy="herding")},
    "replay balanced, by batch": lambda: {"replay": from_page("replay", policy="class_balanced", update="batch")},
}
