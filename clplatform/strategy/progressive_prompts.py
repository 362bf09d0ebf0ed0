"""Progressive Prompts (Razdaibiedina et al. 2023, "Progressive Prompts: Continual Learning for Language Models", ICLR, Sec. 3).

    L = ℓ(f([P_t; P_{t−1}; …; P_1; x]), y),  P_t = θ_t + MLP(θ_t)

A frozen Transformer reads one soft prompt for each task so far, in front of a sample. Task t trains P_t alone, behind an
MLP with a residual connection that only helps to train it and is gone afterwards; the prompts of earlier tasks are fixed
to the bit. A sample of task s is read with P_1 … P_s, as on the day when the task was learned, so task ids must be known;
the loss is over the task's classes.

Prompts come in behind the embeddings (see `clplatform.module.prompt`), and so start from U(0, 0.01) instead of words.

Costs L · D parameters for each task, 2 · D · H for the MLP, and L more tokens for each task so far in every pass: rows of
different tasks in one batch pass one task after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clplatform.module import prompt
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, ClplatformError, Experience, ExperienceInfo, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Prompts(nn.Module):
    """The prompt [L, D] of each task, and the MLP in front of the latest, which is zero when it is over."""

    def __init__(self, length: int, dim: int, hidden: int | None) -> None:
        super().__init__()
        self.length, self.dim, self.hidden = length, dim, hidden
        self.prompts = nn.ParameterList()
        self.mlp: nn.Module | None = None

    def grow(self, index: int, device: torch.device) -> None:
        """Make room for this experience's task; idempotent."""
        for _ in range(len(self.prompts), index + 1):
            self.prompts.append(prompt.uniform(self.length, self.dim).to(device))
            if self.hidden is not None:
                layers = nn.Linear(self.dim, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.dim)
                self.mlp = nn.Sequential(*layers, nn.LayerNorm(self.dim)).to(device)

    def learn(self, index: int) -> None:
        """Let nothing but this experience's prompt be trained (and the MLP)."""
        for i, p in enumerate(self.prompts):
            p.requires_grad_(i == index)

    def latest(self) -> Tensor:
        """θ + MLP(θ) of the latest task."""
        p = self.prompts[-1]
        return p if self.mlp is None else p + self.mlp(p)

    @torch.no_grad()
    def settle(self) -> None:
        """The latest prompt is what the MLP makes of it, from now on."""
        self.prompts[-1].copy_(self.latest())
        for p in self.mlp.parameters() if self.mlp is not None else ():
            p.zero_()

    def up_to(self, index: int) -> Tensor:
        """Prompts of the tasks up to this one, the latest first; [(index + 1) · L, D]."""
        own = [*self.prompts[:-1], self.latest()]
        return torch.cat(own[index::-1])


class ProgressivePrompts(Strategy):
    """One soft prompt for each task, read together with those of the tasks before.

    Args:
        length: L, tokens of a prompt.
        hidden: H, the MLP's hidden size; None: no MLP.
        lr: learning rate of prompt, MLP and head; None: the optimizer's.
    """

    family = "prompt"
    needs = frozenset({"boundaries", "pretrained", "task_ids", "transformer"})
    excludes = FAMILIES - {"regularization", "prototype"}
    first_experience_is_finetuning = False
    why_not = (
        "it trains prompts on a frozen backbone, and rows of earlier experiences, or a copy of the model, would get prompts "
        "that are not theirs"
    )

    def __init__(
        self,
        *,
        length: Annotated[int, Ge(1)],
        hidden: Annotated[int, Ge(1)] | None,
        lr: Annotated[float, Gt(0)] | None,
    ) -> None:
        self.length, self.hidden, self.lr = length, hidden, lr
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if any(e.task_label == info.task_label for e in learner.seen if e.index != info.index):
            raise ClplatformError(
                f"strategy=progressive_prompts learns a task once, and in the experience {info.name!r} task "
                f"{info.task_label} comes back: choose a stream in which each experience is a task of its own"
            )
        learner.backbone.requires_grad_(False)
        if "progressive_prompts" not in learner.extras:
            prompt.check_soft_prompts("progressive_prompts", learner.backbone, learner.info.input)
            size: Any = learner.backbone.feature_size
            learner.extras["progressive_prompts"] = Prompts(self.length, size, self.hidden)
        prompts = self.prompts(learner)
        prompts.grow(info.index, learner.device)
        self.extra = prompt.size_of(prompts)

    @staticmethod
    def prompts(learner: Learner) -> Any:
        return learner.extras["progressive_prompts"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.prompts(learner).learn(experience.index)

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return prompt.without_decay(groups, self.lr)

    # -- the model ------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        prompts, tasks = self.prompts(learner), batch["task_labels"]
        index_of_task = {e.task_label: e.index for e in learner.seen}
        found, order = [], []
        for task in tasks.unique().tolist():
            rows = (tasks == task).nonzero()[:, 0]
            order.append(rows)
            up_to = prompts.up_to(index_of_task.get(task, learner.seen[-1].index))
            with prompt.soft_prompts(learner.backbone, up_to):
                found.append(learner.backbone({name: value[rows] for name, value in batch.items()}))
        features = torch.cat(found)[torch.cat(order).argsort()]
        return run({**batch, "features": features})

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.prompts(learner).settle()

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}
