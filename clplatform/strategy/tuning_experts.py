"""One set of tuned parameters per experience, chosen by task id or by the nearest class mean (S-Prompts' idea, Wang et al. 2022).

A tuning, whichever (`tuning=lora`, `dora`, `ia3`, `adapter`, `prefix`, `prompt`, `p_tuning`, `bitfit`), trains φ on a frozen
backbone. Experience t starts from φ_0, as the tuning begins, and leaves φ_t and a classifier of its own; nothing that an earlier
experience learned is touched again. At inference a sample goes through φ_t(x), of its task id, or, where task ids are hidden, of
the class mean that is nearest (cosine) to its features under φ_0, which are the same before and after every experience:

    t(x) = experience of argmax_k cos(h(x; φ_0), μ_k)

`lora_experts` and `adapters` do this for two kinds of parameters, send the rows of a batch through different experts in one pass,
and may train the backbone in the first experience. Here rows of different experts run one expert after the other.

Costs |φ| numbers for each experience and once more for φ_0, one mean per class, and without task ids a second forward pass at
inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clplatform.data import join
from clplatform.module.experts import Experts
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import PROBLEMS, Batch, ClplatformError, Experience, ExperienceInfo, Output, StreamInfo

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Values(nn.Module):
    """What the tuned parameters are at the start (row 0) and after each experience (row 1 + its number).

    Args:
        start: φ_0, [n].
    """

    rows: Tensor  # [1 + T, n]

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", start.detach().clone()[None])

    def grow(self, info: ExperienceInfo) -> None:
        """Make room for an experience; idempotent."""
        if len(self.rows) < 2 + info.index:
            self.rows = torch.cat([self.rows, self.rows[:1]])


class TuningExperts(Strategy):
    """Tuned parameters and a classifier for each experience, on a frozen backbone."""

    family = "expansion"
    problems = PROBLEMS - {"question_answering"}  # whose head is none of classes
    needs = frozenset({"boundaries", "tuning"})
    # An earlier expert is out of reach: rows of its classes, penalties and distillation would fail or do nothing.
    excludes = FAMILIES - {"baseline"}
    first_experience_is_finetuning = False
    why_not = "every experience trains parameters and a classifier of its own"

    def __init__(self) -> None:
        self.extra = 0
        self.tuned: list[nn.Parameter] = []
        self.learning: int | None = None  # the experience whose values are the parameters' own

    def check(self, info: StreamInfo) -> None:
        if info.several_labels and not info.task_ids:
            raise ClplatformError(
                "strategy=tuning_experts chooses the expert of a text by its task: give stream.scenario=task_incremental"
            )

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if "tuning_experts" not in learner.extras:
            self.tuned = [p for p in learner.backbone.parameters() if p.requires_grad]
            own: Any = nn.Module()
            own.experts, own.values = Experts(learner.backbone.feature_size), Values(self.flat())
            learner.extras["tuning_experts"] = own.to(learner.device)
            learner.head.requires_grad_(False)  # the experts have their own
        self.experts(learner).grow(info)
        self.values(learner).grow(info)
        self.extra = self.experts(learner).n_floats() + self.values(learner).rows.numel()

    @staticmethod
    def experts(learner: Learner) -> Experts:
        own: Any = learner.extras["tuning_experts"]
        return own.experts

    @staticmethod
    def values(learner: Learner) -> Values:
        own: Any = learner.extras["tuning_experts"]
        return own.values

    def flat(self) -> Tensor:
        """φ, [n]."""
        return torch.cat([p.detach().flatten() for p in self.tuned])

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        """Let φ be these values [n]."""
        for p, own in zip(self.tuned, values.split([p.numel() for p in self.tuned]), strict=True):
            p.copy_(own.view_as(p))

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.learning = experience.index
        self.put(self.values(learner).rows[0])
        if not learner.info.several_labels:  # now, so that what is evaluated during training finds the expert
            self.experts(learner).learn_means(learner, experience, lambda batch: self.bare(learner, batch, learner.run))

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.experts(learner).without_decay(groups)

    # -- the model ------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        if learner.training and learner.experience is not None:
            expert = torch.full_like(batch["task_labels"], learner.experience.index)
            output = run(batch)
        else:
            expert = self.experts(learner).choose(learner, batch, lambda: self.bare(learner, batch, run))
            output = self.through(learner, batch, expert, run)
        if learner.info.predicts_text:  # the vocabulary's own output layer
            return output
        return Output(self.experts(learner).head(output.features, expert), output.features)

    def through(self, learner: Learner, batch: Batch, expert: Tensor, run: Run) -> Output:
        """Every row through its expert [B], one expert after the other."""
        outputs, places = [], []
        for index in expert.unique().tolist():
            places.append((expert == index).nonzero()[:, 0])
            with self.acting(learner, index):
                outputs.append(run({name: column[places[-1]] for name, column in batch.items()}))
        return join(outputs, torch.cat(places).argsort())

    def bare(self, learner: Learner, batch: Batch, run: Run) -> Tensor:
        """Features [B, D] under φ_0."""
        with self.acting(learner, None):
            return learner.frozen_features(batch) if run == learner.run else run(batch).features

    @contextmanager
    def acting(self, learner: Learner, index: int | None) -> Iterator[None]:
        """Inside, φ is that of an experience; None: φ_0."""
        if index is not None and index == self.learning:
            yield
            return
        now = self.flat()
        self.put(self.values(learner).rows[0 if index is None else 1 + index])
        try:
            yield
        finally:
            self.put(now)

    # -- the end of an experience ---------------------------------------------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self.values(learner).rows[1 + experience.index] = self.flat()

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}
