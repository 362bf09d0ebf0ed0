"""What a continual-learning strategy may do, and how several are chained.

A strategy is a small stateful object with neutral defaults: it opens only the doors it needs. The order
in which the doors are called, for each experience:

    build → before_experience → train_data → stages → for each stage: before_stage → loader → optimizer →
        for each epoch: before_epoch →
            for each batch: extend_batch → forward → task_loss, loss → (backward) → edit_gradients →
                            (optimizer step) → after_step → after_batch
        → after_epoch
    → after_stage → after_experience
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from clplatform.types import Batch, Data, Experience, ExperienceInfo, Output, Stage, StreamInfo

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from clplatform.data import Loader
    from clplatform.learner import Learner

Run = Callable[[Batch], Output]

# What a strategy may belong to; `excludes = FAMILIES` is one that leaves no room for others.
FAMILIES = frozenset(
    {
        "baseline",
        "regularization",
        "replay",
        "distillation",
        "expansion",
        "isolation",
        "prompt",
        "projection",
        "prototype",
        "plugin",
    }
)


def n_bytes(cost: dict[str, Any]) -> int:
    """What strategies keep beside the model, by their `cost()`."""
    return int(cost.get("buffer_bytes", 0) + 4 * cost.get("extra_parameters", 0))


class Strategy:
    """Base of every strategy. Constructor arguments are keyword-only; their defaults live in the YAML page.

    Class attributes:
        family: one of `FAMILIES`.
        problems: what it can learn, of `clplatform.types.PROBLEMS`.
        needs: what it cannot do without, of `task_ids` (at inference), `boundaries`, `memory`,
            `pretrained`, `hidden_states`, `transformer`, `decoder`, `tuning` (other than `full`), `mergeable`
            (a tuning that becomes a part of the weights), `length` (the number of experiences or classes to come is
            known), `past_data` (`learner.past`: upper bounds only).
        excludes: families, or single strategies, it cannot be combined with, because of `why_not`.
        first_experience_is_finetuning: in the first experience the weights are bit-identical to those of
            plain fine-tuning (`clplatform check` holds it to this word); if not, `why_not` says why.
    """

    family: ClassVar[str] = "baseline"
    problems: ClassVar[frozenset[str]] = frozenset({"classification"})
    needs: frozenset[str] = frozenset()
    excludes: ClassVar[frozenset[str]] = frozenset()
    first_experience_is_finetuning: ClassVar[bool] = True
    why_not: ClassVar[str] = ""

    def check(self, info: StreamInfo) -> None:
        """Refuse (ClplatformError) what cannot run on this stream, before anything is trained or written."""

    # -- structure: from metadata only, idempotent; replayed by resume, load and predict -----------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        """Give the model the parts that this experience needs (adapters, columns, prompts)."""

    # -- data and stages ----------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        """Snapshots, freezing, covariances. When an experience is resumed in its middle this runs again, on
        the weights and state after the previous experience, so what it makes need not be in the state."""

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        """The data to train on (joint, cumulative, pseudo-samples)."""
        return data

    def stages(self, learner: Learner, experience: Experience) -> list[Stage] | None:
        """The gradient-training phases; `[]` trains nothing; None leaves it to the others (one phase)."""
        return None

    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None: ...

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None: ...

    def loader(self, learner: Learner, loader: Loader) -> Loader:
        """The batches of a stage: sized, iterated once for each epoch, keeping its position in `state_dict`."""
        return loader

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return groups

    def optimizer(self, learner: Learner) -> Optimizer | None:
        """The stage's optimizer, in place of a new one; None leaves it to the others."""
        return None

    def before_epoch(self, learner: Learner) -> None:
        """Not called again when an epoch is resumed in its middle."""

    def after_epoch(self, learner: Learner) -> None: ...

    # -- the step -------------------------------------------------------------------------------------------
    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        """Add rows (replay). Rows carry their `source`; take a free one with `learner.source_of(self)`."""
        return batch

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        """Around the model, in training, evaluation and generation."""
        return run(batch)

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor | None:
        """Replaces the task's loss; at most one strategy in a chain may."""
        return None

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Terms to add to the task's loss; each is logged under its name."""
        return {}

    def edit_gradients(self, learner: Learner) -> None:
        """Change `.grad` in place: after unscaling, before clipping."""

    def after_step(self, learner: Learner) -> None:
        """After the optimizer has stepped (not called for a batch that only accumulates)."""

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        """After a training batch (online buffers, stored logits); `output` is detached."""

    # -- the end of an experience: safe to run again after a crash ------------------------------------------
    def after_experience(self, learner: Learner, experience: Experience) -> None:
        """Fisher, memory, prototypes, merging."""

    # -- bookkeeping ------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        """What it holds beside the plain model: `extra_parameters` (floats), `stored_samples`, and `buffer_bytes`: of those
        samples, and of whatever else is no float (masks, who owns a weight)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not in the model: tensors and plain values only (it is loaded without unpickling)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def unsaved(self) -> list[str]:
        """What `state_dict` cannot hold at the moment; while there is any, nothing is saved inside a stage."""
        return []


class Chain(Strategy):
    """Strategies side by side: losses add; data, batches, forwards and gradients pipe in the order given.

    Args:
        strategies: name → strategy; the names label loss terms and costs.

    Raises:
        ValueError: two strategies replace the task loss or declare stages, or one excludes another.
    """

    def __init__(self, strategies: dict[str, Strategy]) -> None:
        self.strategies = strategies
        self.names = {s: name for name, s in strategies.items()}
        self.needs = frozenset().union(*(s.needs for s in strategies.values()))
        for method in ("task_loss", "stages", "optimizer"):
            names = [n for n, s in strategies.items() if getattr(type(s), method) is not getattr(Strategy, method)]
            if len(names) > 1:
                what = {
                    "task_loss": "replace the task loss",
                    "stages": "lay out the training stages",
                    "optimizer": "bring an optimizer",
                }[method]
                raise ValueError(f"{' and '.join(names)} cannot be combined: both {what}, and only one may")
        for name, s in strategies.items():
            for other, o in strategies.items():
                if o is not s and s.excludes & {o.family, other}:
                    raise ValueError(f"{name} cannot be combined with {other} ({o.family}): {s.why_not}")
        self._open: dict[str, list[Strategy]] = {}

    def __iter__(self):
        return iter(self.strategies.values())

    def open(self, door: str) -> list[Strategy]:
        """Those that open this door, so that a step pays only for what is used."""
        if door not in self._open:
            default = getattr(Strategy, door)
            self._open[door] = [s for s in self if getattr(type(s), door) is not default]
        return self._open[door]

    def check(self, info: StreamInfo) -> None:
        for s in self:
            s.check(info)

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        for s in self:
            s.build(learner, info)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        for s in self:
            s.before_experience(learner, experience)

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        for s in self:
            data = s.train_data(learner, experience, data)
        return data

    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        declared = [s.stages(learner, experience) for s in self]
        return next((stages for stages in declared if stages is not None), [Stage()])

    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        for s in self:
            s.before_stage(learner, experience, stage)

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        for s in self:
            s.after_stage(learner, experience, stage)

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for s in self:
            groups = s.parameter_groups(learner, groups)
        return groups

    def loader(self, learner: Learner, loader: Loader) -> Loader:
        for s in self:
            loader = s.loader(learner, loader)
        return loader

    def optimizer(self, learner: Learner) -> Optimizer | None:
        for s in self.open("optimizer"):
            return s.optimizer(learner)
        return None

    def before_epoch(self, learner: Learner) -> None:
        for s in self:
            s.before_epoch(learner)

    def after_epoch(self, learner: Learner) -> None:
        for s in self:
            s.after_epoch(learner)

    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        for s in self.open("extend_batch"):
            batch = s.extend_batch(learner, batch)
        return batch

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        # The first strategy typed is the outermost, as in function composition.
        for s in reversed(self.open("forward")):
            run = _around(s, learner, run)
        return run(batch)

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor | None:
        for s in self.open("task_loss"):
            return s.task_loss(learner, batch, output)
        return None

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for s in self.open("loss"):
            name = self.names[s]
            for term, value in s.loss(learner, batch, output).items():
                terms[term if term == name else f"{name}_{term}"] = value
        return terms

    def edit_gradients(self, learner: Learner) -> None:
        for s in self.open("edit_gradients"):
            s.edit_gradients(learner)

    def after_step(self, learner: Learner) -> None:
        for s in self.open("after_step"):
            s.after_step(learner)

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        for s in self.open("after_batch"):
            s.after_batch(learner, batch, output)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        for s in self:
            s.after_experience(learner, experience)

    def cost(self) -> dict[str, int | float]:
        total: dict[str, int | float] = {}
        for s in self:
            for name, value in s.cost().items():
                total[name] = total.get(name, 0) + value
        return total

    def state_dict(self) -> dict[str, Any]:
        return {name: s.state_dict() for name, s in self.strategies.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, s in self.strategies.items():
            s.load_state_dict(state[name])

    def unsaved(self) -> list[str]:
        return [f"{name}: {what}" for name, s in self.strategies.items() for what in s.unsaved()]


def _around(strategy: Strategy, learner: Learner, run: Run) -> Run:
    return lambda batch: strategy.forward(learner, batch, run)
