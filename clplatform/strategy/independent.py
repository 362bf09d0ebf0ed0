"""Independent models: one for each experience, chosen by task id (Lopez-Paz & Ranzato 2017, "independent" in Sec. 5).

    L(θ_t) = 1/|D_t| Σ_{(x,y) ∈ D_t} ℓ(f(x; θ_t), y),  starting from θ_0;  ŷ(x) = argmax_k f_k(x; θ_{t(x)})

Nothing is forgotten, and nothing is transferred either: the upper bound for forgetting, and what forward transfer is
compared with. Every experience starts from the initial (random or pretrained) backbone and a new head. Where a task
comes back, its latest model answers.

Costs a copy of the model for each earlier experience and one of the initial backbone.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.data import join
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import MASKED, PROBLEMS, Batch, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Independent(Strategy):
    """Train a new model in every experience and keep all."""

    family = "baseline"
    problems = PROBLEMS
    needs = frozenset({"boundaries", "task_ids"})
    excludes = FAMILIES
    why_not = "every experience has a model of its own, to which earlier ones do not matter"

    def __init__(self) -> None:
        self.initial: dict[str, Tensor] | None = None
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        # Structure is built before weights are loaded, so also after a resume these are the initial ones.
        if self.initial is None:
            self.initial = {n: t.detach().cpu().clone() for n, t in learner.backbone.state_dict().items()}
            learner.extras["independent"] = nn.ModuleList()
        earlier = self.earlier(learner)
        if info.index > len(earlier):  # the current model is the learner's own
            model = nn.ModuleDict({"backbone": copy.deepcopy(learner.backbone), "head": copy.deepcopy(learner.head)})
            earlier.append(model.requires_grad_(False))
        self.extra = floats(earlier.state_dict())

    @staticmethod
    def earlier(learner: Learner) -> Any:
        """The models of earlier experiences."""
        return learner.extras["independent"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if experience.index == 0:
            return
        assert self.initial is not None
        model = self.earlier(learner)[experience.index - 1]
        model["backbone"].load_state_dict(learner.backbone.state_dict())
        model["head"].load_state_dict(learner.head.state_dict())  # with rows for new classes, which its task masks
        learner.backbone.load_state_dict(self.initial)
        learner.head = learner.fresh_head()

    # -- the model --------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if learner.training:
            return run(batch)
        latest = {e.task_label: e.index for e in learner.seen}
        own = [latest.get(task, 0) for task in range(1 + max(latest))]
        index = torch.tensor(own, device=batch["task_labels"].device)[batch["task_labels"]]
        parts = []
        for i in index.unique().tolist():
            rows = {name: column[index == i] for name, column in batch.items()}
            parts.append(run(rows) if i == learner.seen[-1].index else self._answer(learner, rows, i, run))
        return join(parts, index.argsort(stable=True).argsort())

    def _answer(self, learner: Learner, batch: Batch, i: int, run: Run) -> Output:
        """What the model of experience `i` says. Logits [B, K of now]."""
        model, now = self.earlier(learner)[i], (learner.backbone, learner.head)
        learner.backbone, learner.head = model["backbone"], model["head"]
        try:
            output = run(batch)
        finally:
            learner.backbone, learner.head = now
        missing = learner.n_classes - output.logits.shape[-1] if learner.info.has_classes else 0
        return replace(output, logits=F.pad(output.logits, (0, missing), value=MASKED))

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra + floats(self.initial or {})}


def floats(state: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in state.values() if t.is_floating_point())
