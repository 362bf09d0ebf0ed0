"""DualPrompt (Wang et al. 2022, "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", ECCV, Sec. 4).

    L = ℓ(f(x; G, E_t), y) + λ (1 − cos(q(x), k_t));  at inference  t(x) = argmax_t cos(q(x), k_t)

A frozen Transformer with prefixes of its attention (prefix tuning): G in some layers, which all experiences train, and E_t
in others, which experience t alone trains. q(x) are the features of the bare backbone, k_t the key of experience t. Which
experience a sample belongs to is known in training; at inference its E is that of the nearest key, or of its task id where
task ids may be used, and then there are no queries. With `mask` the loss ℓ is over the experience's own classes, as in the
authors' code. E_s and k_s with s < t are fixed to the bit, and with `mask` the classifiers of earlier classes too.

Prefixes are keys and values as projections give them, from U(0, 0.01), as in the authors' code, and keys of experiences
from U(−1, 1); every E_t starts anew.

Costs 2 · L_G · D numbers for each layer of G, 2 · L_E · D for each layer of E and experience, and a second pass of each
sample, without gradients; in training only where samples are augmented, or else one pass for each experience, whose
features are held while it lasts. Rows of a batch with different E run in one pass.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor, nn

from clplatform.module import prompt
from clplatform.strategy.base import FAMILIES, Run, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, Output, Stage

if TYPE_CHECKING:
    from clplatform.data import Loader
    from clplatform.learner import Learner


class Prompts(nn.Module):
    """G [layers, 2, L_G, D], and for each experience E [layers, 2, L_E, D] and its key [D]; 2: keys and values."""

    def __init__(self, shared: tuple[int, ...], own: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = own
        self.shared = prompt.uniform(*shared)
        self.own, self.keys = nn.ParameterList(), nn.ParameterList()

    def grow(self, index: int) -> None:
        """Make room for this experience; idempotent."""
        for _ in range(len(self.own), index + 1):
            self.own.append(prompt.uniform(*self.shape).to(self.shared))
            self.keys.append(prompt.uniform(self.shape[-1], low=-1, high=1).to(self.shared))

    def learn(self, index: int) -> None:
        """Let nothing but G and what belongs to this experience be trained."""
        for parts in (self.own, self.keys):
            for i, p in enumerate(parts):
                p.requires_grad_(i == index)


class DualPrompt(Strategy):
    """Prefixes that are shared, and prefixes of each experience.

    Args:
        g_layers, e_layers: layers with shared prefixes, and with those of the experience; 1 is the first.
        g_length, e_length: rows of a prefix: so many keys, and as many values.
        strength: λ, of the term that pulls the experience's key towards its samples.
        mask: is the loss over the experience's own classes only?
        lr: learning rate of prefixes, keys and head; None: the optimizer's.
    """

    family = "prompt"
    needs = frozenset({"boundaries", "pretrained", "transformer"})
    excludes = FAMILIES - {"regularization", "prototype"}
    first_experience_is_finetuning = False
    why_not = (
        "it trains prompts on a frozen backbone, and rows of earlier experiences, or a copy of the model, would get prompts "
        "that are not theirs"
    )

    def __init__(
        self,
        *,
        g_layers: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)],
        g_length: Annotated[int, Ge(1)],
        e_layers: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)],
        e_length: Annotated[int, Ge(1)],
        strength: Annotated[float, Ge(0)],
        mask: bool,
        lr: Annotated[float, Gt(0)] | None,
    ) -> None:
        self.g_layers, self.g_length, self.e_layers, self.e_length = g_layers, g_length, e_layers, e_length
        self.strength, self.mask, self.lr = strength, mask, lr
        self.queries = prompt.Queries()
        self.similarity: Tensor | None = None  # [B], of a training batch to the experience's key
        self.extra = 0

    # -- structure ------------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        learner.backbone.requires_grad_(False)
        if "dualprompt" not in learner.extras:
            for setting in ("g_layers", "e_layers"):
                layers = getattr(self, setting)
                prompt.check_prefixes("dualprompt", learner.backbone, learner.info.input, layers, setting)
            size: Any = learner.backbone.feature_size
            shared = len(self.g_layers), 2, self.g_length, size
            own = len(self.e_layers), 2, self.e_length, size
            learner.extras["dualprompt"] = Prompts(shared, own).to(learner.device)
        prompts = self.prompts(learner)
        prompts.grow(info.index)
        self.extra = prompt.size_of(prompts)

    @staticmethod
    def prompts(learner: Learner) -> Any:
        return learner.extras["dualprompt"]

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        self.prompts(learner).learn(experience.index)

    def parameter_groups(self, learner: Learner, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return prompt.without_decay(groups, self.lr)

    def loader(self, learner: Learner, loader: Loader) -> Loader:
        self.queries.prepare(learner, loader.data)
        return loader

    # -- the model ------------------------------------------------------------------------------------------------
    def forward(self, learner: Learner, batch: Batch, run: Run) -> Output:
        prompts = self.prompts(learner)
        if learner.training and learner.experience is not None:
            now = learner.experience.index
            own = prompts.own[now]
            if not learner.info.task_ids:
                self.similarity = prompt.cosine(self.queries(learner, batch), prompts.keys[now][None])[:, 0]
        else:
            own = torch.stack(list(prompts.own))[self.choose(learner, batch)]
        with ExitStack() as stack:
            for layers, parts in ((self.g_layers, prompts.shared), (self.e_layers, own)):
                keys, values = parts.unbind(-3)  # [(B,) layers, L, D]
                by_layer = {n: (keys[..., i, :, :], values[..., i, :, :]) for i, n in enumerate(layers)}
                stack.enter_context(prompt.prefixes(learner.backbone, by_layer))
            features = learner.backbone(batch)
        return run({**batch, "features": features})

    def choose(self, learner: Learner, batch: Batch) -> Tensor:
        """The experience whose E each sample takes, int64 [B]."""
        if learner.info.task_ids:
            index_of_task = {e.task_label: e.index for e in learner.seen}
            table = torch.tensor([index_of_task.get(t, 0) for t in range(max(index_of_task) + 1)])
            return table.to(batch["task_labels"].device)[batch["task_labels"]]
        keys = torch.stack(list(self.prompts(learner).keys))
        return prompt.cosine(self.queries(learner, batch), keys).argmax(1)

    # -- the step -------------------------------------------------------------------------------------------------
    def task_loss(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        return prompt.task_loss(learner, batch, output, mask=self.mask)

    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if (similarity := self.similarity) is None:
            return {}
        self.similarity = None
        return {"key": self.strength * (1 - similarity).mean()}

    def after_stage(self, learner: Learner, experience: Experience, stage: Stage) -> None:
        self.queries.clear()

    def cost(self) -> dict[str, int | float]:
        return {"extra_parameters": self.extra}
