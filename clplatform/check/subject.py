"""The strategies under test, made anew for every run in the tiny world, and what is seen while they run."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import isroutine
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from clplatform.build import build_strategy
from clplatform.check.guard import guarded as guard
from clplatform.check.promise import DoesNotApply
from clplatform.check.text_world import TinyTextStream, make_text_experiment
from clplatform.check.world import TinyStream, make_experiment, tiny_vit, weights
from clplatform.config import conf_dir
from clplatform.experiment import Experiment
from clplatform.learner import Learner
from clplatform.results import Results
from clplatform.strategy.base import Strategy
from clplatform.stream.blurry import mixed
from clplatform.tuning.base import TUNED
from clplatform.tuning.lora import LoRA

Node = dict[str, Any]
# What makes a model's outputs depend on its mode.
NOISY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
CAPACITY = 20  # of a memory, in a world of 32 samples an experience


FINETUNING: dict[Any, Run] = {}  # plain fine-tuning in each world, with which strategies are compared


class Killed(Exception):
    """A run is broken off."""


@dataclass
class Seen:
    """What a run shows after each of its batches; problems by the name of the check that they belong to."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)  # largest magnitude of each loss term after experience 1

    def add(self, check: str, problem: str) -> None:
        found = self.problems.setdefault(check, [])
        if problem not in found:
            found.append(problem)


class Run:
    """One run in the tiny world, watched.

    Args:
        experiment: not begun.
        strategies: its strategies, by name.
        kill: break off after so many batches of the second experience (0: before it); None: never.
        resume: go on from what is in the experiment's folder.
    """

    def __init__(
        self, experiment: Experiment, strategies: dict[str, Strategy], *, kill: int | None, resume: bool
    ) -> None:
        self.experiment, self.strategies, self.kill, self.seen = experiment, strategies, kill, Seen()
        self.after: list[dict[str, Tensor]] = []  # the model after each experience
        self.learner, self.batches = experiment.learner, 0
        experiment.observers.append(self)
        experiment.fitter.after_batch = self.after_batch
        if resume and (experiment.run_dir / "results.json").exists():
            record = experiment.results.stream
            experiment.results = Results.load(experiment.run_dir)
            experiment.results.widen(record)
        self.killed = False
        try:
            experiment.run(resume=resume)
        except Killed:
            self.killed = True
        self.results = experiment.results

    # -- observer -----------------------------------------------------------------------------------------------
    def start_experience(self, experience: Any, learner: Any, epochs: int) -> None:
        self.batches = 0
        if self.kill == 0 and experience.index == 1:
            raise Killed

    def finish_experience(self, info: Any, results: Any, learner: Any) -> None:
        if info is not None:
            self.after.append(weights(learner))

    def after_batch(self, trainer: Any, learner: Any, batch_idx: int) -> None:
        self.batches += 1
        where = f"experience {learner.experience.index + 1}, batch {self.batches}"
        for name, value in learner.last_terms.items():
            if not value.isfinite():
                self.seen.add("finite", f"the loss term {name} is {float(value)} ({where})")
            if learner.experience.index > 0:
                self.seen.terms[name] = max(self.seen.terms.get(name, 0.0), abs(float(value)))
        for name, p in learner.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                self.seen.add("finite", f"the gradient of {name} is not finite ({where})")
        own = set(learner.modules())
        for name, strategy in self.strategies.items():
            for module in modules(vars(strategy), {id(learner)}):
                for part in module.modules():
                    if part.training and isinstance(part, NOISY) and part not in own:
                        self.seen.add("teachers", f"{name} holds a {type(part).__name__} in training mode ({where})")
            buffer = getattr(strategy, "buffer", None)
            if buffer is not None and len(buffer) > buffer.capacity:
                self.seen.add("memory", f"{name} holds {len(buffer)} samples, capacity={buffer.capacity} ({where})")
        if self.kill is not None and learner.experience.index == 1 and self.batches == self.kill:
            raise Killed


class Subject:
    """What is put through the checks.

    Args:
        nodes: name → node of the configuration (`_target_` and settings).
    """

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self.names = list(nodes)
        samples = self.make()
        self.samples = list(samples.values())
        self.needs = frozenset().union(*(s.needs for s in self.samples))
        self.problems = frozenset.intersection(*(s.problems for s in self.samples))
        self.scenario = "task_incremental" if "task_ids" in self.needs else "class_incremental"
        self.transformer, self.tuned = "transformer" in self.needs, bool(self.needs & TUNED)
        self._scratch = tempfile.mkdtemp(prefix="clplatform-check-")
        weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        self._runs: dict[Any, Run] = {}

    def make(self, **changes: Any) -> dict[str, Strategy]:
        """New objects; `changes`: settings, for those that have them."""
        made = {}
        for name, node in self.nodes.items():
            own = {key: value for key, value in changes.items() if key in node}
            made[name] = build_strategy(name, {**node, **own})
        return made

    def folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._scratch))

    def run(self, **how: Any) -> Run:
        """A run, made once for each way; see `new_run`."""
        key = tuple(sorted((name, str(value)) for name, value in how.items()))
        runs = self._runs
        if how.get("who") == "finetuning":  # the same for all subjects of a world
            runs, key = FINETUNING, (*key, self.scenario, self.transformer, self.tuned)
        if key not in runs:
            runs[key] = self.new_run(**how)
        return runs[key]

    def new_run(
        self, *, who: str = "subject", kill: int | None = None, resume: bool = False, guarded: bool = False, **how: Any
    ) -> Run:
        """A run that is not kept; see `blank`.

        Args:
            who: the `subject`, `finetuning` in its place, or `with replay` before it.
            guarded: see what it reads that it must not.
        """
        strategies = self.chosen(who)
        experiment = self.blank(strategies=strategies, **how)
        if not guarded:
            return Run(experiment, strategies, kill=kill, resume=resume)
        # A plugin's memory refers to what it has read.
        past = "past_data" in self.needs or any(s.family == "plugin" for s in self.samples)
        watched = guard(experiment, past=past)
        run = Run(experiment, strategies, kill=kill, resume=resume)
        for violation in sorted(set(watched.violations)):
            run.seen.add("reads", violation)
        return run

    def blank(
        self, *, strategies: dict[str, Strategy] | None = None, text: bool = False, scenario: str | None = None,
        share: float | None = None, stream: TinyStream | None = None, folder: Path | None = None, **options: Any,
    ) -> Experiment:  # fmt: skip
        """An experiment that is not begun.

        Args:
            text: batches of text.
            scenario: the subject's own by default.
            share: of each experience's samples that the others get, without boundaries; None: clear boundaries.

        Raises:
            DoesNotApply: the strategies do not learn classes, which the tiny worlds are of.
        """
        if "classification" not in self.problems:
            learned = " and ".join(sorted(self.problems)) or "nothing together"
            raise DoesNotApply(f"not checked: it learns {learned}, and the worlds of this suite are of classes")
        settings: dict[str, Any] = {"trainer": {"max_epochs": 8 if text or self.transformer else 4}}
        settings |= {"optimizer": partial(torch.optim.AdamW, lr=0.01)} if text or self.transformer else {"dropout": 0.2}
        if self.transformer and not text:
            settings["backbone"] = tiny_vit()
        make = make_text_experiment if text else make_experiment
        settings["stream"] = stream or self.stream(text=text, scenario=scenario, share=share)
        made = make(folder or self.folder(), strategies or self.make(), **{**settings, **options})
        self.tune(made.learner)
        return made

    def tune(self, learner: Learner) -> None:
        """Where a tuning is needed, the backbone has one, which goes into whatever has linear layers."""
        if self.tuned:
            LoRA(rank=2, alpha=16.0, dropout=0.0, targets="all").apply(learner.backbone, learner.info.input)

    def chosen(self, who: str) -> dict[str, Strategy]:
        if who == "finetuning":
            return {who: build_strategy(who, page(who))}
        if who == "with replay":
            return {"replay": build_strategy("replay", page("replay") | {"capacity": CAPACITY}), **self.make()}
        return self.make()

    def stream(self, *, text: bool = False, scenario: str | None = None, share: float | None = None) -> TinyStream:
        """Three experiences, of which the last is known and never trained."""
        stream = (TinyTextStream if text else TinyStream)(3, scenario=scenario or self.scenario)
        stream.experiences.pop()
        if share is not None:
            stream.info = replace(stream.info, boundaries=False)
            stream.experiences = mixed(stream.experiences, share, seed=0)
        return stream


def page(name: str) -> Node:
    """The node of a strategy's page."""
    return yaml.safe_load((conf_dir() / "strategy" / f"{name}.yaml").read_text())[name]


def modules(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Every module that can be reached from an object's attributes."""
    if id(value) in seen or isinstance(value, type | Tensor):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from modules(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from modules(item, seen)
    elif hasattr(value, "__dict__") and not isroutine(value):
        yield from modules(vars(value), seen)


def tensors(value: Any, seen: set[int], ours: frozenset[str] = frozenset({"clplatform"})) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object's attributes, through objects of the packages `ours`."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict(keep_vars=True).values()
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, seen, ours)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors(item, seen, ours)
    elif type(value).__module__.partition(".")[0] in ours and hasattr(value, "__dict__"):
        yield from tensors(vars(value), seen, ours)
