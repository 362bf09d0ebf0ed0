"""Plugins from YAML nodes and short names."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from clplatform.types import ClplatformError

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def made(*nodes: Any, texts: bool = False) -> list[Any]:
    from clplatform.avalanche_host.plugins import make_plugins

    model = nn.Linear(2, 2)
    return make_plugins(list(nodes), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), texts=texts)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "avalanche.training.plugins.ReplayPlugin", "mem_size": 7},
        {"replay": {"mem_size": 7}},
        {"ReplayPlugin": {"mem_size": 7}},
    ],
)
def test_three_ways_to_say_the_same(node: Any) -> None:
    from avalanche.training.plugins import ReplayPlugin

    (plugin,) = made(node)
    assert type(plugin) is ReplayPlugin
    assert plugin.mem_size == 7


def test_names_alone_in_any_case() -> None:
    from avalanche.training.plugins import FromScratchTrainingPlugin, GSS_greedyPlugin, LwFPlugin

    kinds = [type(p) for p in made("lwf", "from_scratch_training", "GSS_greedy")]
    assert kinds == [LwFPlugin, FromScratchTrainingPlugin, GSS_greedyPlugin]


def test_nested_nodes_are_made() -> None:
    policy = {"_target_": "avalanche.training.storage_policy.ClassBalancedBuffer", "max_size": 9}
    (plugin,) = made({"replay": {"mem_size": 9, "storage_policy": policy}})
    assert type(plugin.storage_policy).__name__ == "ClassBalancedBuffer"


def test_the_model_and_a_schedule_s_optimizer_are_given() -> None:
    step = {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 2}
    cwr, schedule = made("cwr_star", {"lr_scheduler": {"scheduler": step}})
    assert isinstance(cwr.model, nn.Linear)
    assert not isinstance(schedule.scheduler, partial)
    assert schedule.scheduler.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("reply", r"plugins\[0\]=reply: Avalanche ships no such plugin; did you mean replay\?; it ships AGEMPlugin, .*"),
        ("nothing", r"plugins\[0\]=nothing: .*ships AGEMPlugin, .*SynapticIntelligencePlugin"),
        ({"replay": {"memsize": 7}}, r"plugins\[0\]\.memsize: there is no such setting; did you mean mem_size\?"),
        ({"ewc": {}}, r"plugins\[0\]\.ewc_lambda is missing"),
        ({"ewc": {"ewc_lambda": 1.0, "mode": "twice"}}, "EWCPlugin refuses its settings: .*separate or online"),
        ({"a": {}, "b": {}}, "give a name"),
        ({"replay": 7}, "give a name"),
        ({"_target_": "torch.nn.Linear", "in_features": 2}, "not a plugin of Avalanche"),
        ({"_target_": "avalanche.training.plugins.NoPlugin"}, "there is no such class"),
        ({"cwr_star": {"model": 1}}, "set by clplatform itself"),
        (
            {"lr_scheduler": {"scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step": 1}}},
            "scheduler.step: there is no such setting",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(node: Any, message: str) -> None:
    with pytest.raises(ClplatformError, match=message):
        made(node)
