"""Every supervised plugin that Avalanche ships, and how it fares in the host: the table of docs/avalanche_plugins.md.

Each word of the table is tested in tests/avalanche_host/.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from text_world import LENGTH
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from world import DIM


class Lazy:
    """A module that is imported when something of it is needed (Avalanche takes seconds)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.name), name)


P, M, E = Lazy("avalanche.training.plugins"), Lazy("avalanche.models"), Lazy("avalanche.evaluation.metrics")
ICARL, LOSSES = Lazy("avalanche.training.supervised.icarl"), Lazy("avalanche.training.losses")
G = Lazy("clplatform.avalanche_host.generator")

Native = Callable[[nn.Module, Optimizer, list[int]], list[Any]]
SHAPE, TEXT_SHAPE = [1, 1, DIM], [2, LENGTH]


@dataclass(frozen=True)
class Case:
    """A plugin, or several that belong together.

    Attributes:
        nodes: as in YAML; `SHAPE` is that of x.
        native: (model, optimizer, shape of x) → the same plugins, made by hand for Avalanche's own loop.
        changes: of other settings of the page.
        options: of `run_native`; functions are called.
        same: "identical" to Avalanche's own loop, "close" to it, or "no": it cannot be hosted.
        texts: "identical", too; "yes": it runs, and Avalanche's own loop does not; or "no".
        resume: "inside" an experience; "repeats" the experience; or "no".
        acts: does it change the weights?
        remark: for the table: why not, how close, what to know.
    """

    nodes: list[Any]
    native: Native = lambda model, optimizer, shape: []
    changes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    scenario: str = "class_incremental"
    epochs: int = 2
    same: str = "identical"
    texts: str = "identical"
    resume: str = "inside"
    acts: bool = True
    remark: str = ""

    def nodes_for(self, texts: bool) -> list[Any]:
        """The nodes for x of this kind."""
        return replaced(self.nodes, TEXT_SHAPE) if texts else self.nodes

    def options_made(self) -> dict[str, Any]:
        return {name: value() if callable(value) else value for name, value in self.options.items()}


def replaced(node: Any, shape: list[int]) -> Any:
    if node is SHAPE:
        return shape
    if isinstance(node, dict):
        return {name: replaced(value, shape) for name, value in node.items()}
    return [replaced(value, shape) for value in node] if isinstance(node, list) else node


def step(scheduler: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": f"torch.optim.lr_scheduler.{scheduler}", "_partial_": True, **settings}


def classifier(name: str, **settings: Any) -> dict[str, Any]:
    return {"eval_classifier": {"_target_": f"avalanche.models.{name}", **settings}}


NCM = {
    "changes": classifier("NCMClassifier"),
    "options": {"eval_classifier": lambda: M.NCMClassifier()},
    "acts": False,
    "remark": "with `eval_classifier`",
}
FECAM: dict[str, Any] = {
    "changes": classifier("FeCAMClassifier", tukey=False),
    "options": {"eval_classifier": lambda: M.FeCAMClassifier(tukey=False)},
    "acts": False,
    "remark": "with `eval_classifier`; its power transform needs features that are not negative",
}
VALIDATED: dict[str, Any] = {
    "changes": {"evaluate_every": 1},
    "remark": "with `evaluate_every`",
    "options": {"evaluate_every": 1, "metrics": lambda: (E.accuracy_metrics(stream=True), E.loss_metrics(stream=True))},
}

CASES: dict[str, Case] = {
    "EWCPlugin": Case([{"ewc": {"ewc_lambda": 100.0}}], lambda m, o, shape: [P.EWCPlugin(100.0)]),
    "EWCPlugin, online": Case(
        [{"ewc": {"ewc_lambda": 100.0, "mode": "online", "decay_factor": 0.5}}],
        lambda m, o, shape: [P.EWCPlugin(100.0, "online", 0.5)],
    ),
    "SynapticIntelligencePlugin": Case(
        [{"si": {"si_lambda": 1e5}}],
        lambda m, o, shape: [P.SynapticIntelligencePlugin(1e5)],
        acts=False,
        remark="on a CPU it changes nothing, in Avalanche either: it keeps views of the weights for copies",
    ),
    "MASPlugin": Case(["mas"], lambda m, o, shape: [P.MASPlugin()]),
    "RWalkPlugin": Case(
        [{"rwalk": {"delta_t": 2}}],
        lambda m, o, shape: [P.RWalkPlugin(delta_t=2)],
        same="close",
        remark="it copies the weights in `before_training`, when Avalanche's head has not grown yet and ours has: new "
        "rows count as moved from their first values, not from zero",
    ),
    "RWalkPlugin, a head that does not grow": Case(
        [{"rwalk": {"delta_t": 2}}], lambda m, o, shape: [P.RWalkPlugin(delta_t=2)], scenario="domain_incremental"
    ),
    "LwFPlugin": Case(["lwf"], lambda m, o, shape: [P.LwFPlugin()]),
    "LwFPlugin, task ids": Case(["lwf"], lambda m, o, shape: [P.LwFPlugin()], scenario="task_incremental"),
    "LFLPlugin": Case([{"lfl": {"lambda_e": 1.0}}], lambda m, o, shape: [P.LFLPlugin(1.0)]),
    "FeatureDistillationPlugin": Case(
        ["feature_distillation"], lambda m, o, shape: [P.FeatureDistillationPlugin()], options={"keep": True}
    ),
    "AGEMPlugin": Case(
        [{"agem": {"patterns_per_experience": 8, "sample_size": 8}}],
        lambda m, o, shape: [P.AGEMPlugin(8, 8)],
        resume="repeats",
    ),
    "GEMPlugin": Case(
        [{"gem": {"patterns_per_experience": 8, "memory_strength": 0.5}}], lambda m, o, shape: [P.GEMPlugin(8, 0.5)]
    ),
    "ReplayPlugin": Case([{"replay": {"mem_size": 20}}], lambda m, o, shape: [P.ReplayPlugin(20)]),
    "ReplayPlugin, task ids": Case(
        [{"replay": {"mem_size": 20, "task_balanced_dataloader": True}}],
        lambda m, o, shape: [P.ReplayPlugin(20, task_balanced_dataloader=True)],
        scenario="task_incremental",
    ),
    "MIRPlugin": Case(
        [{"mir": {"batch_size_mem": 8, "mem_size": 20, "subsample": 12}}],
        lambda m, o, shape: [P.MIRPlugin(8, 20, 12)],
        resume="repeats",
    ),
    "GSS_greedyPlugin": Case(
        [{"gss_greedy": {"mem_size": 40, "input_size": SHAPE}}],
        lambda m, o, shape: [P.GSS_greedyPlugin(40, 5, shape)],
        remark="`input_size` is the shape of an image, or 2 and the length of a text",
    ),
    "GDumbPlugin": Case([{"gdumb": {"mem_size": 20}}], lambda m, o, shape: [P.GDumbPlugin(20)]),
    "RARPlugin": Case(
        [{"rar": {"batch_size_mem": 8, "mem_size": 20, "name_ext_layer": "backbone.layer"}}],
        lambda m, o, shape: [P.RARPlugin(8, 20, name_ext_layer="backbone.layer")],
        texts="no",
        resume="no",
        remark="moves pixels; traces the backbone symbolically, which plain PyTorch ones allow; an iterator that it keeps "
        "over experiences cannot be saved",
    ),
    "CoPEPlugin": Case(
        [{"cope": {"mem_size": 20, "n_classes": 2, "p_size": 2, "T": 1.0, "max_it_cnt": 3}}],
        lambda m, o, shape: [P.CoPEPlugin(20, 2, 2, T=1.0, max_it_cnt=3)],
        options={"flat": True},
        scenario="domain_incremental",
        remark="`p_size` is the number of logits: for streams whose classes do not grow",
    ),
    "BiCPlugin": Case(
        [{"bic": {"mem_size": 40, "stage_2_epochs": 3}}],
        lambda m, o, shape: [P.BiCPlugin(40, stage_2_epochs=3)],
        remark="Avalanche's own loop fails with this PyTorch and with datasets of `benchmark_from_datasets`: compared "
        "with both repaired; without task ids",
    ),
    "_ICaRLPlugin and ICaRLLossPlugin": Case(
        [{"icarl": {"memory_size": 20}}],
        lambda m, o, shape: [ICARL._ICaRLPlugin(20)],
        remark="with `eval_classifier` and `criterion`",
        changes=classifier("NCMClassifier") | {"criterion": {"_target_": "avalanche.training.losses.ICaRLLossPlugin"}},
        options={"eval_classifier": lambda: M.NCMClassifier(), "criterion": lambda: LOSSES.ICaRLLossPlugin()},
    ),
    "GenerativeReplayPlugin and TrainGeneratorAfterExpPlugin": Case(
        [
            "TrainGeneratorAfterExp",
            {
                "generative_replay": {
                    "generator_strategy": {
                        "_target_": "clplatform.avalanche_host.generator.vae",
                        "shape": SHAPE,
                        "batch_size": 8,
                    }
                }
            },
        ],
        lambda m, o, shape: [
            P.TrainGeneratorAfterExpPlugin(),
            P.GenerativeReplayPlugin(generator_strategy=G.vae(shape=shape, batch_size=8)),
        ],
        texts="no",
        remark="generates images; the generator is a strategy of its own, such as `clplatform.avalanche_host.generator.vae`",
    ),
    "CWRStarPlugin": Case(["cwr_star"], lambda m, o, shape: [P.CWRStarPlugin(m)]),
    "FromScratchTrainingPlugin": Case(["from_scratch_training"], lambda m, o, shape: [P.FromScratchTrainingPlugin()]),
    "LRSchedulerPlugin, keeping the rate": Case(
        [{"lr_scheduler": {"scheduler": step("StepLR", step_size=1, gamma=0.5), "reset_lr": False}}],
        lambda m, o, shape: [P.LRSchedulerPlugin(StepLR(o, 1, 0.5), reset_lr=False)],
    ),
    "LRSchedulerPlugin, by validation loss": Case(
        [{"lr_scheduler": {"scheduler": step("ReduceLROnPlateau", patience=0, factor=0.1), "metric": "val_loss"}}],
        lambda m, o, shape: [P.LRSchedulerPlugin(ReduceLROnPlateau(o, patience=0, factor=0.1), metric="val_loss")],
        epochs=6,
        **VALIDATED,
    ),
    "EarlyStoppingPlugin": Case(
        [{"early_stopping": {"patience": 1, "val_stream_name": "validation_stream"}}],
        lambda m, o, shape: [P.EarlyStoppingPlugin(1, "validation_stream")],
        epochs=6,
        **VALIDATED,
    ),
    "CurrentDataNCMUpdate": Case(["CurrentDataNCMUpdate"], lambda m, o, shape: [P.CurrentDataNCMUpdate()], **NCM),
    "MemoryNCMUpdate": Case(
        [{"MemoryNCMUpdate": {"mem_size": 20}}], lambda m, o, shape: [P.MemoryNCMUpdate(20)], **NCM
    ),
    "NCMOracle": Case(["NCMOracle"], lambda m, o, shape: [P.NCMOracle()], **NCM),
    "CurrentDataFeCAMUpdate": Case(
        ["CurrentDataFeCAMUpdate"], lambda m, o, shape: [P.CurrentDataFeCAMUpdate()], **FECAM
    ),
    "MemoryFeCAMUpdate": Case(
        [{"MemoryFeCAMUpdate": {"mem_size": 20}}], lambda m, o, shape: [P.MemoryFeCAMUpdate(20)], **FECAM
    ),
    "FeCAMOracle": Case(["FeCAMOracle"], lambda m, o, shape: [P.FeCAMOracle()], **FECAM),
    "PackNetPlugin": Case(
        [{"packnet": {"post_prune_epochs": 1}}],
        same="no",
        texts="no",
        resume="no",
        remark="prunes layers of its own kind (`PackNetModel`), which no backbone here is made of",
    ),
    "_ExpertGatePlugin": Case(
        ["expert_gate"],
        same="no",
        texts="no",
        resume="no",
        remark="trains AlexNets of its own in place of the backbone, and only `ExpertGateStrategy` has its settings",
    ),
}
