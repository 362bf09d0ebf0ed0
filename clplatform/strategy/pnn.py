"""Progressive neural networks (Rusu et al. 2016, Eq. 1 and 2): a column for each experience, connected to all before it.

    h_i^{(k)} = f( W_i^{(k)} h_{i−1}^{(k)} + Σ_{j<k} U_i^{(k:j)} h_{i−1}^{(j)} )                                   (linear)
    h_i^{(k)} = f( W_i^{(k)} h_{i−1}^{(k)} + U_i^{(k)} σ( V_i^{(k)} [α_1 h_{i−1}^{(1)}; …; α_{k−1} h_{i−1}^{(k−1)}] ) )  (adapter)

Experience k trains a backbone of its own, the connections into it and its classes' rows of the classifier; all that earlier
ones trained is frozen (and runs in eval mode), so nothing is forgotten. σ is ReLU, V projects to the width of its layer, and
α starts between 0 and 0.1. A perceptron has these connections in every layer but the first, any backbone has them in the
classifier. In a Transformer they go from a block's outputs to the next block's input, token by token: x_i^{(k)} = h_{i−1}^{(k)} +
a_i^{(k)}, because attention and norms are no single W. Every column starts from the initial (random or pretrained) weights.

Costs a backbone for each earlier experience, one copy of the initial one, and connections whose number grows with the square
of the experiences. A sample of experience k passes through k columns. Row t of a batch goes through the columns of its task.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clplatform.module.held import Held, n_rows
from clplatform.module.lateral import Kind, Laterals, run_column
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, ClplatformError, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.learner import Learner


class Columns(nn.Module):
    """The backbones of earlier experiences, and the connections into the column of each experience but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.columns, self.laterals = nn.ModuleList(), nn.ModuleList()

    def train(self, mode: bool = True) -> Columns:
        """Earlier columns stay in eval mode."""
        super().train(mode)
        self.columns.eval()
        return self

    @property
    def frozen(self) -> list[nn.Module]:
        """No stage may train it."""
        return [*self.columns.modules(), *self.laterals[:-1].modules()]


class PNN(Strategy):
    """Train a new column for each experience, on top of all earlier ones.

    Args:
        lateral: the connections: `linear` (Eq. 1) or with a hidden layer (`adapter`, Eq. 2).
    """

    family = "expansion"
    needs = frozenset({"boundaries", "task_ids"})
    excludes = FAMILIES - {"baseline", "plugin"}
    why_not = "every experience has a column of its own, and earlier columns are frozen"

    def __init__(self, *, lateral: Kind) -> None:
        self.lateral: Kind = lateral
        self.initial: dict[str, Tensor] | None = None
        self.rows: dict[int, dict[str, int]] = {}  # of the head's parameters, by experience
        self.held = Held()
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        if any(e.task_label == info.task_label for e in learner.seen if e.index != info.index):
            raise ClplatformError(
                f"strategy=pnn learns a task once, and in the experience {info.name!r} task {info.task_label} comes back: "
                "choose a stream in which each experience is a task of its own"
            )
        # Structure is built before weights are loaded, so also after a resume these are the initial ones.
        if self.initial is None:
            self.initial = {n: t.detach().cpu().clone() for n, t in learner.backbone.state_dict().items()}
            learner.extras["pnn"] = Columns()
        own = self.own(learner)
        if info.index > len(own.columns):  # the current column is the learner's backbone
            own.columns.append(copy.deepcopy(learner.backbone).requires_grad_(False).eval())
            more = Laterals(learner.backbone, kind=self.lateral, n_columns=info.index, n_classes=len(info.classes))
            own.laterals.append(more.to(learner.device))
        for i, laterals in enumerate(own.laterals):
            laterals.requires_grad_(i == info.index - 1)
        self.rows[info.index] = n_rows(learner.head)
        self.extra = floats(own.state_dict())

    @staticmethod
    def own(learner: Learner) -> Any:
        return learner.extras["pnn"]

    # -- training -------------------------------------------------------------------------------------------------
    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if experience.index == 0:
            return
        assert self.initial is not None
        self.own(learner).columns[experience.index - 1].load_state_dict(learner.backbone.state_dict())
        learner.backbone.load_state_dict(self.initial)

    def before_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.held.release()
        if experience.index > 0:
            self.held.hold_rows(learner.head, self.rows[experience.index - 1])

    def edit_gradients(self, learner: Learner) -> None:
        self.held.zero_gradients()

    def after_step(self, learner: Learner) -> None:
        self.held.restore()

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.held.release()

    # -- the model ------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        own = self.own(learner)
        if len(learner.seen) == 1:
            return run(batch)
        of_task = {e.task_label: e.index for e in learner.seen}
        tasks, row = batch["task_labels"].unique(return_inverse=True)
        column = torch.tensor([of_task[t] for t in tasks.tolist()], device=row.device)[row]  # in which a row ends
        rows, earlier = torch.arange(len(row), device=row.device), []
        found: list[tuple[Tensor, Tensor]] = []  # rows, and their features
        parts: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, classes, and what is added to their logits
        for k in range(int(column.max()) + 1):
            if not (goes_on := column[rows] >= k).all():
                rows, earlier = rows[goes_on], [[h[goes_on] for h in states] for states in earlier]
            states = self.pass_through(learner, {n: v[rows] for n, v in batch.items()}, k, earlier)
            ends = column[rows] == k
            found.append((rows[ends], states[-1][ends]))
            if k > 0 and ends.any():
                classes = torch.tensor(learner.seen[k].classes, device=row.device)
                parts.append((rows[ends], classes, own.laterals[k - 1].head([s[-1][ends] for s in earlier])))
            earlier.append(states)
        order = torch.cat([r for r, _ in found]).argsort()
        output = run({**batch, "features": torch.cat([f for _, f in found])[order]})
        more = torch.zeros_like(output.logits)
        for r, classes, logits in parts:
            more[r[:, None], classes] = logits.to(more.dtype)
        return Output(output.logits + more, output.features)

    def pass_through(self, learner: Learner, batch: Batch, k: int, earlier: list[list[Tensor]]) -> list[Tensor]:
        """The states of column k (see `run_column`)."""
        own, is_last = self.own(learner), k == learner.seen[-1].index
        backbone = learner.backbone if is_last else own.columns[k]
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_last):
            return run_column(backbone, batch, own.laterals[k - 1] if k else None, earlier)

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra + floats(self.initial or {})}


def floats(state: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in state.values() if t.is_floating_point())
