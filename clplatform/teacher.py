"""The model as it was: what distillation learns from."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplatform.head.span import close_places
from clplatform.head.vocabulary import answer
from clplatform.types import Batch, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Teacher:
    """A frozen copy of a learner's backbone and head, in eval mode. It is no module, so that neither the
    optimizer nor `train()` reaches it."""

    def __init__(self, learner: Learner) -> None:
        modules = learner.backbone, learner.head
        self.backbone, self.head = (copy.deepcopy(m).eval().requires_grad_(False) for m in modules)
        self.learner = learner

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Output:
        """The model of then, wrapped by the same strategies. Logits [B, K of then], features [B, D]."""
        return self.learner.chain.forward(self.learner, batch, self._run)

    def _run(self, batch: Batch) -> Output:
        features = batch["features"] if "features" in batch else self.backbone(batch)
        return Output(close_places(batch, self.classify(features, batch["task_labels"])), features)

    @torch.no_grad()
    def classify(self, features: Tensor, task_labels: Tensor) -> Tensor:
        """Features [B, D], task_labels [B] → logits [B, K of then]."""
        return self.learner.mask_tasks(answer(self.backbone, self.head, features, task_labels), task_labels)

    def n_parameters(self) -> int:
        return sum(p.numel() for module in (self.backbone, self.head) for p in module.parameters())
