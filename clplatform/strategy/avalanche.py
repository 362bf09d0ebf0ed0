"""Plugins of Avalanche, unmodified (Carta et al. 2023, "Avalanche: A PyTorch Library for Deep Continual Learning").

Any of Avalanche's supervised plugins, one or several, in the order given; `docs/avalanche_plugins.md` says which run to
the same bits as in Avalanche's own loop. They change the loss, the gradients g, the batches B, or the model:

    θ_new = θ − η · g( ∇ [ ℓ(f(B), y) + Σ_plugins penalty ] )

Strengths are Avalanche's own and not those of clplatform's strategies of the same name. The optimizer starts anew with
each experience, as everywhere here (`reset_optimizer: false` keeps its state, as Avalanche does), and `before_training`
and `after_training` are called for each experience, as for `train(experience)`.

Costs what the plugins cost: copies of the model, samples, passes of their own; plugins that bring a data loader read
samples one at a time. Plugins that hold a data loader in use are not saved inside an experience: a resumed run repeats it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, MinLen
from torch import Tensor

from clplatform.data import lengths
from clplatform.memory.buffer import raw_rows
from clplatform.strategy.base import Run, Strategy
from clplatform.types import Batch, ClplatformError, Data, Experience, ExperienceInfo, Output, Stage, StreamInfo

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from clplatform.avalanche_host.host import Host
    from clplatform.data import Loader
    from clplatform.learner import Learner


class Avalanche(Strategy):
    """Host Avalanche's plugins.

    Args:
        plugins: each a short name (`replay`), a short name with settings (`{replay: {mem_size: 200}}`), or a node
            (`{_target_: avalanche.training.plugins.ReplayPlugin, mem_size: 200}`).
        criterion: node of the loss (logits, y) → scalar; None: cross-entropy.
        eval_classifier: node of a classifier of features [B, D] that plugins fill and that is used outside of training,
            such as `{_target_: avalanche.models.NCMClassifier}`; None: the head.
        evaluate_every: epochs between evaluations on the experience's validation data, for plugins that look at
            metrics; None: never.
        reset_optimizer: does the optimizer forget its state before each experience?
    """

    family = "plugin"
    needs = frozenset({"boundaries"})

    def __init__(
        self,
        *,
        plugins: Annotated[list[dict[str, Any] | str], MinLen(1)],
        criterion: dict[str, Any] | None,
        eval_classifier: dict[str, Any] | None,
        evaluate_every: Annotated[int, Ge(1)] | None,
        reset_optimizer: bool,
    ) -> None:
        self.plugins, self.criterion, self.eval_classifier = plugins, criterion, eval_classifier
        self.evaluate_every, self.reset_optimizer = evaluate_every, reset_optimizer
        self.host: Host | None = None
        self.data: Data | None = None  # the experience's, while it is trained on
        self.sample_bytes = 0  # of a sample as a memory of ours would keep it, the longest one of texts

    def check(self, info: StreamInfo) -> None:
        with up_to_date():
            from clplatform.avalanche_host.plugins import check_memories, resolve
        check_memories(resolve(self.plugins, texts=info.input.modality == "text"), info)

    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if self.host is None:  # here, because plugins may need the model
            with up_to_date():
                from clplatform.avalanche_host.host import hosting
            from clplatform.build import make_nested

            self.host = hosting(
                learner=learner,
                plugins=self.plugins,
                source=learner.source_of(self),
                criterion=make_nested(self.criterion),
                eval_classifier=make_nested(self.eval_classifier),
                evaluate_every=self.evaluate_every,
                reset_optimizer=self.reset_optimizer,
            )

    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        self.data = data
        longest = 0 if (n := lengths(data)) is None else int(n.argmax())
        row = raw_rows(data.fetch(torch.tensor([longest])), source=None)
        self.sample_bytes = max(self.sample_bytes, sum(column.nbytes for column in row.values()))
        return data

    def stages(self, learner: Learner, experience: Experience) -> list[Stage]:
        return [Stage()]  # plugins know only one

    def loader(self, learner: Learner, loader: Loader) -> Loader:
        assert self.data is not None
        return self._host.begin(self.data, loader)

    def optimizer(self, learner: Learner) -> Optimizer:
        if learner.trainer.accumulate_grad_batches != 1:
            raise ClplatformError(
                "trainer.accumulate_grad_batches: plugins of Avalanche step with every batch; leave it 1"
            )
        return self._host.hosted.optimizer

    def before_epoch(self, learner: Learner) -> None:
        self._host.begin_epoch()

    def after_epoch(self, learner: Learner) -> None:
        self._host.end_epoch()

    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        assert learner.experience is not None
        if self._host.begun != learner.experience.index:  # a step outside of a fit
            self._host.begin(learner.experience.train, None)
        return self._host.begin_step(batch)

    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        host = self._host
        if host.hosted.model.depth.passes or (learner.training and not host.in_step):  # a pass of a plugin, a teacher
            return run(batch)
        return host.forward(batch, run) if learner.training else host.evaluate(batch, run)

    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        return self._host.loss(output)

    def edit_gradients(self, learner: Learner) -> None:
        self._host.edit_gradients()

    def after_step(self, learner: Learner) -> None:
        self._host.after_step()

    def after_batch(self, learner: Learner, batch: Batch, output: Output) -> None:
        self._host.end_step()

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        self._host.end()
        self.data = None

    @property
    def _host(self) -> Host:
        assert self.host is not None, "build() comes first"
        return self.host

    def cost(self) -> dict[str, int | float]:
        """Where plugins store samples they refer to the stream's; counted is what a memory of ours would take for them."""
        found = self.host.cost() if self.host is not None else {}
        stored = found.get("stored_samples", 0)
        return {**found, "buffer_bytes": stored * self.sample_bytes} if stored else found

    def unsaved(self) -> list[str]:
        return self.host.unsaved() if self.host is not None else []

    def state_dict(self) -> dict[str, Any]:
        return {**self.host.state_dict(), "sample_bytes": self.sample_bytes} if self.host is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._host.load_state_dict(state)
            self.sample_bytes = max(self.sample_bytes, state.get("sample_bytes", 0))  # not in checkpoints of before


@contextlib.contextmanager
def up_to_date() -> Iterator[None]:
    """Without remarks that what Avalanche imports is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
