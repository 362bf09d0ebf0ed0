"""PackNet (Mallya & Lazebnik 2018, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning", Sec. 3).

    prune(W) = { i ∈ free(W) : |W_i| among the smallest p·|free(W)| },  owner_i = t for the other free weights of W
    W_t = W · 1[1 ≤ owner ≤ t]

The paper has no numbered equations. Each experience trains the weights that no earlier one owns, on top of those that are
owned. Then in every weight tensor of the backbone the smallest p of what was free are set to zero and stay free for later
experiences; the others are retrained with these zeros and are owned, and never change again. At inference the weights of
later experiences are masked, so that a task's outputs are those of the day it was learned, to the bit.

Weights are the backbone's trainable parameters of two dimensions or more (linear layers, convolutions, embeddings).
Biases and norms learn in the first experience only, as do the statistics of batch-norm; a head's rows learn in the
experience that brings them. Gradients of what is fixed are zeroed, and its values put back after every step, because
momentum and weight decay would move it.

Costs two bytes for each weight (its owner), a second stage of training in each experience, and in training a copy of the
trainable parameters. Earlier tasks are predicted with a masked copy of the backbone's weights, made for each batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.func import functional_call

from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, ClplatformError, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Owners(nn.Module):
    """For every weight of the backbone the number of the experience that owns it, from 1; 0: it is free."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        for name, p in backbone.named_parameters():
            if p.requires_grad and p.ndim >= 2:
                self.register_buffer(_key(name), torch.zeros_like(p, dtype=torch.int16))

    def named(self, backbone: nn.Module) -> dict[str, Tensor]:
        """By the name of the parameter in the backbone."""
        held = dict(self.named_buffers())
        return {name: held[_key(name)] for name, _ in backbone.named_parameters() if _key(name) in held}


class PackNet(Strategy):
    """Prune after each experience, and train the next one in what was pruned.

    Args:
        prune: p, the share of the free weights that stays free, in each tensor.
        retrain_epochs: epochs after pruning; None: as many as before.
    """

    family = "isolation"
    needs = frozenset({"boundaries", "task_ids"})
    excludes = FAMILIES - {"baseline", "plugin"}
    first_experience_is_finetuning = False
    why_not = "it prunes and retrains, and what an earlier experience owns never changes"

    def __init__(self, *, prune: Annotated[float, Ge(0), Lt(1)], retrain_epochs: Annotated[int, Ge(1)] | None) -> None:
        self.prune, self.retrain_epochs = prune, retrain_epochs
        self.rows: dict[int, dict[str, int]] = {}  # sizes of the head's parameters, by experience
        self.n_bytes = 0  # of the owners
        # While a stage runs, by parameter: where it may change, and its value elsewhere
        self.free: dict[str, Tensor] = {}
        self.fixed: dict[str, Tensor] = {}

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if any(e.task_label == info.task_label for e in learner.seen if e.index != info.index):
            raise ClplatformError(
                f"strategy=packnet learns a task once, and in the experience {info.name!r} task {info.task_label} comes "
                "back: choose a stream in which each experience is a task of its own"
            )
        if "packnet" not in learner.extras:
            learner.extras["packnet"] = Owners(learner.backbone).to(learner.device)
            self.n_bytes = sum(owner.nbytes for owner in self.owners(learner).values())
        self.rows[info.index] = {n: len(p) if p.ndim else 0 for n, p in learner.head.named_parameters()}

    @staticmethod
    def owners(learner: Learner) -> dict[str, Tensor]:
        owners: Any = learner.extras["packnet"]
        return owners.named(learner.backbone)

    # -- training -------------------------------------------------------------------------------------------------
    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        return [Stage("train"), Stage("retrain", max_epochs=self.retrain_epochs)]

    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.free = self.changeable(learner, experience.index, 0 if stage.name == "train" else experience.index + 1)
        named = dict(learner.named_parameters())
        self.fixed = {name: named[name].detach().clone() for name in self.free}

    def changeable(self, learner: Learner, index: int, owner: int) -> dict[str, Tensor]:
        """Where each trainable parameter may change while the weights of this owner do."""
        owners = {f"backbone.{name}": o for name, o in self.owners(learner).items()}
        found = {}
        for name, p in learner.named_parameters():
            if not p.requires_grad:
                continue
            if name in owners:
                found[name] = owners[name] == owner
            else:
                found[name] = torch.full_like(p, index == 0, dtype=torch.bool)
                if index > 0 and name.startswith("head.") and p.ndim:
                    found[name][self.rows[index - 1].get(name.removeprefix("head."), 0) :] = True
        return found

    def edit_gradients(self, learner: Learner) -> None:
        named = dict(learner.named_parameters())
        for name, free in self.free.items():
            gradient = named[name].grad
            if gradient is not None:
                gradient.masked_fill_(~free, 0)

    @torch.no_grad()
    def after_step(self, learner: Learner) -> None:
        named = dict(learner.named_parameters())
        for name, free in self.free.items():
            named[name].copy_(torch.where(free, named[name], self.fixed[name]))

    @torch.no_grad()
    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.free, self.fixed = {}, {}
        if stage.name != "train":
            return
        named = dict(learner.backbone.named_parameters())
        for name, owner in self.owners(learner).items():
            weight, flat = named[name].view(-1), owner.view(-1)
            free = (flat == 0).nonzero()[:, 0]
            order = free[weight[free].abs().argsort(stable=True)]
            n = round(self.prune * len(order))
            weight[order[:n]] = 0
            flat[order[n:]] = experience.index + 1

    # -- the model ------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if learner.training:
            if learner.experience is not None and learner.experience.index > 0:
                for module in learner.backbone.modules():
                    if isinstance(module, NORMS):
                        module.eval()
            return run(batch)
        tasks = batch["task_labels"]
        if len(found := tasks.unique().tolist()) == 1:
            return run(self.prepare(learner, batch, found[0]))
        n, output = len(tasks), None
        for task in found:
            rows = (tasks == task).nonzero()[:, 0]
            part = {name: value[rows] if len(value) == n else value for name, value in batch.items()}
            part = run(self.prepare(learner, part, task))
            if output is None:
                output = Output(*(x.new_zeros(n, x.shape[1]) for x in (part.logits, part.features)))
            output.logits[rows], output.features[rows] = part.logits, part.features
        assert output is not None
        return output

    def prepare(self, learner: Learner, batch: Batch, task: int) -> Batch:
        """The batch of one task with its features [B, D], if the task has a mask: the latest has all weights."""
        index = next((e.index for e in learner.seen[:-1] if e.task_label == task), None)
        if index is None:
            return batch
        named = dict(learner.backbone.named_parameters())
        masked = {
            name: named[name] * ((owner > 0) & (owner <= index + 1)) for name, owner in self.owners(learner).items()
        }
        return {**batch, "features": functional_call(learner.backbone, masked, (batch,))}

    def cost(self) -> dict[str, int | float]:
        return {"buffer_bytes": self.n_bytes}


def _key(name: str) -> str:
    """A name that a buffer may have."""
    return name.replace(".", "/")
