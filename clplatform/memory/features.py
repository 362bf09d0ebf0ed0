"""Features of a frozen backbone: computed once for each stage instead of in every step, and once for what is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clplatform.data import trim
from clplatform.memory.buffer import raw_rows
from clplatform.types import Batch, Data

if TYPE_CHECKING:
    from clplatform.learner import Learner


class FrozenFeatures:
    """Features of a stage's training data, of samples without augmentation, from the backbone in eval mode.

    They are found by where a sample comes from (`source`) and its `index`. Rows that are not among them (a memory's)
    pass through the backbone when they are asked for, without augmentation too. Holds N · D numbers while a stage lasts.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.data: Data | None = None  # whose features are still to be computed
        self.keys = torch.zeros(0, dtype=torch.int64)  # [N], sorted
        self.features = torch.zeros(0, 0)  # [N, D]

    def prepare(self, data: Data) -> None:
        """The features of all of `data` will be computed when they are first asked for: inside the training, where the
        model has the precision that it is trained in."""
        self.clear()
        self.data = data

    @torch.no_grad()
    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """The features [B, D] of a training batch."""
        if self.data is not None:
            self._fill(learner, self.data)
        learner.backbone.eval()  # whatever mode the rest of the model is in
        if not len(self.keys):
            return learner.backbone(trim(raw_rows(batch, None)))
        key = _key(batch)
        place = torch.searchsorted(self.keys, key).clamp_max(len(self.keys) - 1)
        features, unknown = self.features[place], self.keys[place] != key
        if unknown.any():
            rows = {name: value[unknown] for name, value in raw_rows(batch, None).items()}
            features[unknown] = learner.backbone(trim(rows)).to(features)
        return features

    def _fill(self, learner: Learner, data: Data) -> None:
        self.data = None
        learner.backbone.eval()
        found = [(_key(batch), learner.backbone(batch)) for batch in learner.batches(data)]
        keys, features = (torch.cat(column) for column in zip(*found, strict=True))
        keys, order = keys.sort()
        if not (keys[1:] == keys[:-1]).any():  # else: a sample in several versions (permuted copies, all in one stage)
            self.keys, self.features = keys, features[order]


class KeptFeatures:
    """Features of a frozen backbone, of data that are evaluated again and again: computed once, and held as long as the data.

    Args:
        backbone: that is frozen. What others put in its place for a while (an average) is computed anew, and so is one with
            batch normalisation, whose statistics go on though its weights are frozen.
    """

    def __init__(self, backbone: nn.Module) -> None:
        moving = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
        self.backbone = None if moving else id(backbone)
        self.known: WeakKeyDictionary[Data, dict[Any, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
        self.now: tuple[dict[Any, tuple[Tensor, Tensor]], int] | None = None  # the data and the batch of the moment

    @contextmanager
    def of(self, data: Data) -> Iterator[Callable[[int], None]]:
        """Inside, `data` are evaluated; gives a function to be told the number of the batch that comes next."""
        known = self.known.setdefault(data, {})

        def at(number: int) -> None:
            self.now = known, number

        try:
            yield at
        finally:
            self.now = None

    def __call__(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """The features [B, D] of a batch."""
        if self.now is None or id(backbone) != self.backbone:
            return backbone(batch)
        known, number = self.now
        weight = next(backbone.parameters())
        key = number, weight.dtype, weight.device  # Lightning may convert the model when it is first trained
        index, features = known.get(key, (None, None))
        if index is None or features is None or not torch.equal(index, batch["index"]):
            features = backbone(batch).detach()
            known[key] = batch["index"], features
        return features


def _key(batch: Batch) -> Tensor:
    """One number for `source` and `index`, int64 [B]; a memory's own rows say no source."""
    source = batch.get("source", torch.full_like(batch["index"], -1))
    return (source << 48) + batch["index"]
