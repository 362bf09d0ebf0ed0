"""LAMOL (Sun, Ho & Lee 2020, "LAMOL: LAnguage MOdeling for Lifelong Language Learning", Sec. 3). One language model learns to
answer and to write samples of its own, and rehearses what it has written.

    sample                     x = source,  y = target,  ANS = the token from which a target starts,  EOS = the one that ends it
    L_QA  = −log p(y EOS | x ANS)                       mean over tokens: the task's loss
    L_LM  = −log p(x ANS y EOS | GEN_t)                 mean over tokens: the whole sample, after a generation token
    L     = L_QA + λ L_LM

Before experience t > 1 the model writes γ |D_t| samples of earlier experiences, as many of each: what follows GEN_s, s < t, is
drawn token by token from the k most likely ones. They are trained on, by the same loss, along with D_t. What has no form of
a sample (one ANS, one EOS, nothing cut) is left out, as the authors do. No sample is stored.

Generation tokens are vectors of the strategy's own in the place of a token's, one for each experience (the paper's
task-specific token) or one for all; the model never writes them. It costs γ |D_t| generated samples for each experience, a second
forward and backward pass for L_LM, and D parameters for each token.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clplatform.backbone.pseudo import Form, write_samples
from clplatform.data import PADDING, TensorData
from clplatform.module.more_tokens import more_tokens
from clplatform.module.perturbation import token_embedding
from clplatform.strategy.base import Strategy
from clplatform.types import IGNORED, Batch, ClplatformError, Data, Experience, ExperienceInfo, Output, StreamInfo

if TYPE_CHECKING:
    from clplatform.learner import Learner


class LAMOL(Strategy):
    """Rehearse samples that the model writes itself.

    Args:
        language_model: λ.
        ratio: γ.
        token: a generation token for each `task` (experience), or `one` for all.
        top_k: tokens that a sample's next token is drawn from.
        temperature: of the draw.
    """

    family = "replay"
    problems = frozenset({"seq2seq"})
    needs = frozenset({"boundaries", "decoder"})
    first_experience_is_finetuning = False
    why_not = "the language-model loss over whole samples is added from the first experience on"

    def __init__(
        self,
        *,
        language_model: Annotated[float, Ge(0)],
        ratio: Annotated[float, Ge(0)],
        token: Literal["task", "one"],
        top_k: Annotated[int, Ge(1)],
        temperature: Annotated[float, Gt(0)],
    ) -> None:
        self.weight, self.ratio, self.token, self.top_k, self.temperature = (
            language_model, ratio, token, top_k, temperature,
        )  # fmt: skip
        self.extra = 0  # numbers that the generation tokens have
        self.task_of = torch.zeros(0, dtype=torch.int64)  # the token of each pseudo-sample, by −1 − `index`
        self.written: list[list[int]] = []  # of each experience: pseudo-samples that were drawn, and those of a form

    def check(self, info: StreamInfo) -> None:
        if self.token == "one" and info.task_ids:
            raise ClplatformError(
                f"strategy.lamol.token=one: nobody knows of which task a sample is that one token generates, and "
                f"stream={info.name} is task-incremental; give token=task"
            )

    # -- structure ----------------------------------------------------------------------------------------------
    def build(self, learner: Learner, info: ExperienceInfo) -> None:
        """A vector for each generation token; new ones begin like tokens of the vocabulary."""
        embedding: Any = token_embedding(learner.backbone)
        if "lamol" not in learner.extras:
            learner.extras["lamol"] = nn.ParameterList().to(learner.device)
        tokens: Any = learner.extras["lamol"]
        weight = embedding.weight.detach()
        while len(tokens) < (info.index + 1 if self.token == "task" else 1):
            drawn = torch.randn(weight.shape[1]).to(weight)
            tokens.append(nn.Parameter((weight.float().mean(0) + weight.float().std(0) * drawn.float()).to(weight)))
        self.extra = sum(p.numel() for p in tokens)

    def vectors(self, learner: Learner) -> Tensor:
        """Of the generation tokens, [n, D]."""
        tokens: Any = learner.extras["lamol"]
        return torch.stack([*tokens])

    def number(self, index: int) -> int:
        """The generation token of an experience."""
        return index if self.token == "task" else 0

    # -- pseudo-samples --------------------------------------------------------------------------------------------
    def train_data(self, learner: Learner, experience: Experience, data: Data) -> Data:
        self.task_of = self.task_of[:0]
        del self.written[experience.index :]
        n = round(self.ratio * len(data)) if experience.index else 0
        if n == 0:
            self.written.append([0, 0])
            return data
        earlier = [e for e in learner.seen if e.index < experience.index]
        which = torch.arange(n) % len(earlier)  # γ |D_t| / (t − 1) of each
        rows, kept = self.write(learner, Form.of(experience.train.fetch(torch.arange(1)), learner.info.input), which)
        self.written.append([n, len(kept)])
        if len(kept) == 0:
            return data
        self.task_of = which[kept] if self.token == "task" else torch.zeros(len(kept), dtype=torch.int64)
        task_labels = torch.tensor([e.task_label for e in earlier])[which[kept]]
        rows |= {"task_labels": task_labels, "index": -1 - torch.arange(len(kept))}
        return data + TensorData(rows, transform=partial(_with_source, source=learner.source_of(self)))

    def write(self, learner: Learner, form: Form, which: Tensor) -> tuple[Batch, Tensor]:
        """Samples of these earlier experiences [n]: columns of those that have the form of one, and their places [m]."""
        size = embedding_size(learner)
        tokens = size + (which if self.token == "task" else torch.zeros_like(which))
        with more_tokens(learner.backbone, self.vectors(learner).detach()):
            return write_samples(learner, form, tokens, top_k=self.top_k, temperature=self.temperature)

    # -- the loss ----------------------------------------------------------------------------------------------------
    def loss(self, learner: Learner, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.weight == 0:
            return {}
        own = (batch["source"] == 0) | (batch["source"] == learner.source_of(self))  # of others the task is not known
        assert learner.experience is not None
        tokens = torch.full_like(batch["index"], self.number(learner.experience.index))
        pseudo = batch["source"] == learner.source_of(self)
        tokens[pseudo] = self.task_of.to(tokens.device)[-1 - batch["index"][pseudo]]
        rows = {name: value[own] for name, value in batch.items() if len(value) == len(own)}
        whole = whole_samples(rows, embedding_size(learner) + tokens[own])
        with more_tokens(learner.backbone, self.vectors(learner)):
            found = learner(whole)
        return {"language_model": self.weight * learner.task_loss(whole, found)}

    # -- bookkeeping -------------------------------------------------------------------------------------------------
    def cost(self) -> dict[str, int | float]:
        drawn, kept = (sum(counts[i] for counts in self.written) for i in (0, 1))
        return {"extra_parameters": self.extra, "generated_samples": drawn, "generated_samples_kept": kept}

    def state_dict(self) -> dict[str, Any]:
        return {"written": [list(counts) for counts in self.written]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.written = [list(counts) for counts in state["written"]]


def embedding_size(learner: Learner) -> int:
    """Tokens that the model can embed: the first generation token's number."""
    embedding: Any = token_embedding(learner.backbone)
    return embedding.num_embeddings


def whole_samples(batch: Batch, tokens: Tensor) -> Batch:
    """Pairs of texts as texts: GEN, source, ANS, target, and what follows each of them.

    Args:
        batch: `input_ids`, `attention_mask` [B, S], `decoder_input_ids` (ANS, target), `labels` (target, EOS) [B, T].
        tokens: GEN of each row, [B].
    """
    source, written = batch["input_ids"], batch["decoder_input_ids"]
    mask_S, mask_T = batch["attention_mask"].bool(), batch["labels"] != IGNORED
    one = torch.ones_like(mask_S[:, :1])
    read = torch.cat([tokens[:, None], source, written], 1)
    read, mask = to_the_left(read, torch.cat([one, mask_S, mask_T], 1), PADDING["input_ids"])
    follows = torch.cat([source, written[:, :1], batch["labels"]], 1)
    labels, _ = to_the_left(follows, torch.cat([mask_S, one, mask_T], 1), IGNORED)
    rest = {name: batch[name] for name in ("task_labels", "index", "source")}
    return {**rest, "input_ids": read, "attention_mask": mask.long(), "labels": labels}


def to_the_left(values: Tensor, mask: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    """Values [B, T] where the mask is True, in their order, then `fill`; and the mask moved alike."""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    width = int(mask.sum(1).max()) if len(mask) else 0
    return values.gather(1, order).masked_fill(~mask, fill)[:, :width], mask[:, :width]


def _with_source(batch: Batch, source: int) -> Batch:
    return {**batch, "source": torch.full((len(batch["labels"]),), source)}
