"""Classifiers of which each experience has one, and the class means that choose among them where task ids are hidden.

    t(x) = experience of argmax_k cos(h(x), μ_k)

h(x) are features that no experience changes, μ_k the mean of the normalised features of a class of an experience (the idea
of S-Prompts, Wang et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.head.multi import MultiHead
from clplatform.module.mode import eval_mode
from clplatform.types import Batch, Experience, ExperienceInfo

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Experts(nn.Module):
    """The classifiers (`head`, which takes the number of an experience for the task) and the class means.

    Args:
        feature_size: D.
    """

    means: Tensor  # [M, D], one for each class of each experience
    experience_of_mean: Tensor  # [M]

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        self.head = MultiHead(feature_size=feature_size)
        self.register_buffer("means", torch.zeros(0, feature_size))
        self.register_buffer("experience_of_mean", torch.zeros(0, dtype=torch.int64))

    def grow(self, info: ExperienceInfo) -> None:
        """Make room for an experience; idempotent."""
        if (self.experience_of_mean == info.index).any():
            return
        self.head.grow(replace(info, task_label=info.index))
        n = len(info.classes)
        self.means = torch.cat([self.means, self.means.new_zeros(n, self.means.shape[1])])
        self.experience_of_mean = torch.cat(
            [self.experience_of_mean, self.experience_of_mean.new_full((n,), info.index)]
        )

    def choose(self, learner: Learner, batch: Batch, bare: Callable[[], Tensor]) -> Tensor:
        """The experience [B] whose expert answers: the latest of a sample's task, or that of the nearest class mean.

        Args:
            bare: features [B, D] of the samples as no experience changes them; asked only where task ids are hidden.
        """
        if learner.info.task_ids:
            index_of_task = {e.task_label: e.index for e in learner.seen}
            table = torch.tensor([index_of_task.get(t, 0) for t in range(max(index_of_task) + 1)])
            return table.to(batch["task_labels"].device)[batch["task_labels"]]
        similarity = F.normalize(bare().float(), dim=1) @ F.normalize(self.means.float(), dim=1).T
        return self.experience_of_mean[similarity.argmax(1)]

    @torch.no_grad()
    def learn_means(self, learner: Learner, experience: Experience, bare: Callable[[Batch], Tensor]) -> None:
        """The class means of an experience, of the model in eval mode.

        Args:
            bare: a batch's features [B, D] as no experience changes them.
        """
        sums = torch.zeros(len(experience.classes), self.means.shape[1], device=learner.device, dtype=torch.float32)
        counts = sums.new_zeros(len(experience.classes))
        classes = torch.tensor(experience.classes, device=learner.device)
        with eval_mode(learner):
            for batch in learner.batches(experience.train):
                position = torch.searchsorted(classes, batch["labels"])
                sums.index_add_(0, position, F.normalize(bare(batch).float(), dim=1))
                counts += torch.bincount(position, minlength=len(classes))
        means = (sums / counts[:, None].clamp_min(1)).to(self.means.dtype)
        self.means[self.experience_of_mean == experience.index] = means

    def without_decay(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, in which nothing of this decays: weight decay would wear away the rows of
        earlier experts, which get no gradient."""
        own = {id(p) for p in self.parameters()}
        kept = [{**g, "params": [p for p in g["params"] if id(p) not in own]} for g in groups]
        apart = {"params": [p for g in groups for p in g["params"] if id(p) in own], "weight_decay": 0.0}
        return [g for g in (*kept, apart) if g["params"]]

    def n_floats(self) -> int:
        """Numbers that it holds."""
        return sum(p.numel() for p in self.parameters()) + self.means.numel()
