"""Equal memory: every strategy may keep so many bytes beside the model, and its capacity is made to fit.

What a strategy keeps is what its `cost()` says: the bytes of stored samples (with logits and whatever else it stores of them) and
of masks, and four for each extra parameter (a teacher, importances, columns, prompts). How much that is for a stored sample, and
how much without any, is measured: the strategies learn the whole stream once, a step and a few samples of each experience, with a small
memory. What the rest of the budget has room for is the capacity. Several strategies with a capacity share it evenly.

A strategy whose memory does not grow with its capacity from the start (directions of gradients) keeps the capacity it was given;
what is kept is checked after every experience, whatever was estimated.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clplatform import build
from clplatform.data import lengths
from clplatform.experiment import Experiment
from clplatform.report.format import size
from clplatform.strategy.base import Chain, n_bytes
from clplatform.types import ClplatformError, Data, Experience, ExperienceInfo, Stream

Config = dict[str, Any]
FEW = 64  # samples of an experience


class Sketch(Experiment):
    """Learns, and neither evaluates nor records."""

    def _evaluate(self) -> None: ...
    def _record(self, experience: Experience, times: dict[str, float]) -> None: ...


class FewSamples:
    """A stream with few training samples in each experience, the longest text among them.

    Args:
        stream: the whole one.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream, self.info = stream, stream.info

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> Experience:
        experience = self.stream[index]
        return replace(experience, train=few(experience.train))

    def __iter__(self) -> Iterator[Experience]:
        return (self[i] for i in range(len(self)))


def few(data: Data) -> Data:
    """A few samples of every class, and the longest one."""
    rows = torch.linspace(0, len(data) - 1, min(FEW, len(data))).long()
    if data.labels.ndim == 1:
        firsts = [(data.labels == label).nonzero()[:4, 0] for label in data.labels.unique()]
        rows = torch.cat([rows, *firsts])
    if (n := lengths(data)) is not None:
        rows = torch.cat([rows, n.argmax()[None]])
    return data.select(rows.unique())


def fit_capacity(config: Config, stream: Stream) -> dict[str, int]:
    """The capacity for each strategy that has one, by name, so that all is within `budget.bytes`.

    Raises:
        ClplatformError: what is kept beside the samples is too much already, or leaves too little room.
    """
    most, n_classes = config["budget"]["bytes"], len(stream.info.class_names)
    with_capacity = [name for name, node in config["strategy"].items() if isinstance(node.get("capacity"), int)]
    small = max(n_classes, FEW)
    costs = sketch(with_capacities(config, dict.fromkeys(with_capacity, small)), stream)
    per_sample = {name: costs[name].get("buffer_bytes", 0) / small for name in with_capacity}
    sized = {name: each for name, each in per_sample.items() if each > 0}
    if len(sized) < len(with_capacity):  # the others keep the capacity they were given, and that is not `small`
        costs = sketch(with_capacities(config, dict.fromkeys(sized, small)), stream)
    fixed = {
        name: n_bytes(cost) - (cost.get("buffer_bytes", 0) if name in sized else 0) for name, cost in costs.items()
    }
    room = most - sum(fixed.values())
    if room < 0:
        raise too_much(fixed, most, "")
    found = {name: int(room / len(sized) // each) for name, each in sized.items()}
    for name, capacity in found.items():
        if capacity < n_classes:
            beside = f" beside the {size(sum(fixed.values()))} of what else is kept" if sum(fixed.values()) else ""
            raise ClplatformError(
                f"budget.bytes={most} has room for {capacity} samples of strategy={name} ({size(sized[name])} each){beside}, "
                f"and stream={stream.info.name} has {n_classes} classes; give it {int(most - room) + n_needed(sized, n_classes)} "
                "or more"
            )
    return found


def n_needed(sized: dict[str, float], n_classes: int) -> int:
    return int(-(-max(sized.values()) * n_classes * len(sized) // 1))


def with_capacities(config: Config, capacity: dict[str, int]) -> Config:
    """A copy of the configuration with these capacities."""
    changed = copy.deepcopy(config)
    for name, n in capacity.items():
        changed["strategy"][name]["capacity"] = n
    return changed


def sketch(config: Config, stream: Stream) -> dict[str, dict[str, float]]:
    """Strategy → its cost after the whole stream, of which it has seen a few samples."""
    chain = build.build_strategies(config)
    fitter = build.build_fitter({**config, "budget": {}, "early_stopping": None})
    fitter.trainer = {**fitter.trainer, "max_steps": 1, "accumulate_grad_batches": 1}
    fitter.batch_size = min(fitter.batch_size, FEW)
    part: Any = FewSamples(stream)
    augment = stream.augment if stream.augments else None
    with tempfile.TemporaryDirectory() as folder:
        experiment = Sketch(
            learner=build.build_learner(config, stream.info, chain, augment=augment),
            stream=part,
            fitter=fitter,
            results=None,  # type: ignore[arg-type]  nothing is recorded
            run_dir=Path(folder),
            config=config,
            seed=config["seed"],
        )
        for experience in part:
            experiment._learn(experience, resume=False)
    return {name: {**s.cost()} for name, s in chain.strategies.items()}


class MemoryLimit:
    """Ends a run whose strategies keep more than they may, before the experience that has led to it is recorded.

    Args:
        most: bytes.
        chain: the strategies.
    """

    def __init__(self, most: int, chain: Chain) -> None:
        self.most, self.chain = most, chain

    def __call__(self, info: ExperienceInfo) -> None:
        held = {name: n_bytes(s.cost()) for name, s in self.chain.strategies.items()}
        if sum(held.values()) > self.most:
            raise too_much(held, self.most, f" after experience {info.index + 1}")


def too_much(held: Mapping[str, float], most: int, when: str) -> ClplatformError:
    names = " and ".join(f"strategy={name} keeps {n:.0f} bytes" for name, n in held.items() if n)
    return ClplatformError(
        f"{names} beside the model{when}, more than budget.bytes={most}; give it a larger budget, or leave it out of a "
        "comparison at equal memory"
    )
