"""Zero- and few-shot accuracy of a causal language model (Brown et al. 2020, Sec. 2.4), before, between and after experiences.

    s_c = 1/n · Σ_t log p(w_ct | prompt, w_c<t)          w_c: the n tokens of the words of label c (without 1/n: the total)
    ŷ = argmax_c s_c                                     or, calibrated (Zhao et al. 2021, Sec. 5, W = diag(p_cf)⁻¹, b = 0):
    ŷ = argmax_c softmax(s)_c / p_cf,c                   p_cf: mean of softmax(s) over texts without content

A prompt begins where a document does in the streams, behind the token that ends one. It costs a forward pass for each sample and
label, whose seconds and operations are not among the run's; no random number is drawn.

N  prompts    C  labels    T  tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplatform.data import TensorData, by_length
from clplatform.evaluate import evaluating
from clplatform.learner import Learner
from clplatform.prompting.task import CONTENT_FREE, PromptedTask
from clplatform.random_state import random_state, set_random_state
from clplatform.results import Results
from clplatform.types import IGNORED, Batch, ClplatformError, Experience, ExperienceInfo, InputSpec, StreamInfo


class Questions:
    """The prompts of a task with the words of each label, tokenized.

    Args:
        tokenizer: of the stream.

    Raises:
        ClplatformError: a file is not as it should be, or words are longer than what the model reads.
    """

    def __init__(self, task: PromptedTask, tokenizer: Any, spec: InputSpec) -> None:
        self.task = task
        examples = task.examples()
        texts, labels = task.read(task.test)
        asked = [*texts[: task.limit], *(CONTENT_FREE if task.calibrated else ())]
        self.answers = torch.tensor([task.labels.index(label) for label in labels[: task.limit]])
        assert spec.max_length is not None
        self.n_cut, self.longest = 0, spec.max_length
        rows = [row for text in asked for row in self._rows(tokenizer, spec, *task.choices(text, examples))]
        self.data = as_data(rows, spec)

    def _rows(self, tokenizer: Any, spec: InputSpec, prompt: str, words: list[str]) -> list[tuple[list[int], int]]:
        """For each label the tokens of prompt and words, and how many of the last ones are scored."""
        assert spec.max_length is not None and spec.eos_token_id is not None
        known, *whole = tokenizer(
            [prompt, *(prompt + w for w in words)], add_special_tokens=False, split_special_tokens=True,
            return_attention_mask=False, verbose=False,
        )["input_ids"]  # fmt: skip
        rows, cut = [], False
        for word, ids in zip(words, whole, strict=True):
            n = len(ids) - same(known, ids)  # words may change how the end of the prompt is cut into tokens
            if not 0 < n <= spec.max_length:
                raise ClplatformError(
                    f"prompting.{self.task.name}.verbalisers: {word.strip()!r} has {n} tokens; the model reads "
                    f"{spec.max_length} (stream.max_length)"
                )
            text = [spec.eos_token_id, *ids]
            cut |= len(text) > spec.max_length + 1
            rows.append((text[-spec.max_length - 1 :], n))
        self.n_cut += cut
        return rows

    def notes(self) -> list[str]:
        """What the report must say was cut."""
        n, of = self.n_cut, len(self.data) // len(self.task.labels)
        what = f"prompts are cut, from their beginning, to the {self.longest} tokens that the model reads"
        return [f"prompting.{self.task.name}: {n} of {of} {what}"] if n else []

    def accuracy(self, learner: Learner, batch_size: int) -> float:
        """Share of the samples whose label is the best."""
        scores = self.scores(learner, batch_size)
        n = len(self.answers)
        if self.task.calibrated:
            free = scores[n:].softmax(1).mean(0)
            scores = scores[:n].log_softmax(1) - free.log()
        return (scores.argmax(1) == self.answers).double().mean().item()

    def scores(self, learner: Learner, batch_size: int) -> Tensor:
        """s_c of every prompt and label, float64 [N, C]."""
        data, back = by_length(self.data)
        found = []
        with evaluating(learner):
            for batch in learner.batches(data, batch_size=batch_size):
                found.append(log_likelihoods(learner, batch).cpu())
        total = torch.cat(found)[back].view(-1, len(self.task.labels))
        if not self.task.normalised:
            return total
        n = (self.data.labels != IGNORED).sum(1).view(total.shape)
        return total / n


def same(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def as_data(rows: list[tuple[list[int], int]], spec: InputSpec) -> TensorData:
    """Texts as columns of a causal language model; labels where they are scored."""
    width = max(len(text) for text, _ in rows) - 1
    ids = torch.full((len(rows), width), spec.pad_token_id or 0)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (text, n) in enumerate(rows):
        length = len(text) - 1
        ids[i, :length], mask[i, :length] = torch.tensor(text[:-1]), 1
        labels[i, length - n : length] = torch.tensor(text[-n:])
    common = {"task_labels": torch.zeros(len(rows), dtype=torch.int64), "index": torch.arange(len(rows))}
    return TensorData({**common, "input_ids": ids, "attention_mask": mask, "labels": labels})


def log_likelihoods(learner: Learner, batch: Batch) -> Tensor:
    """Σ log p of the labels of each text, float64 [B]."""
    labels = batch["labels"]
    scored = labels != IGNORED
    log_p = learner(batch).logits[scored].double().log_softmax(-1)  # of the tokens that count
    each = log_p.gather(1, labels[scored][:, None])[:, 0]
    rows = scored.nonzero()[:, 0]
    return torch.zeros(len(labels), dtype=torch.float64, device=labels.device).index_add_(0, rows, each)


class Prompting:
    """Watches a run, and asks the tasks before it, between experiences and after it.

    Args:
        questions: of every task.
        results: the record; `results.prompting` has the accuracies of a task, one for each row of the matrix.
        batch_size: prompts with the words of one label, at once.
    """

    def __init__(self, questions: list[Questions], results: Results, batch_size: int) -> None:
        self.questions, self.results, self.batch_size = questions, results, batch_size

    def start_experience(self, experience: Experience, learner: Learner, epochs: int) -> None:
        """Where a run was broken off before it could ask, it does so now: nothing has been learned since."""
        if any(len(self.rows(q)) <= experience.index for q in self.questions):
            self.ask(learner, experience.index)

    def finish_experience(self, info: ExperienceInfo | None, results: Results, learner: Learner) -> None:
        self.ask(learner, 0 if info is None else info.index + 1)

    def rows(self, questions: Questions) -> list[float | None]:
        return self.results.prompting.setdefault(questions.task.name, [])

    def ask(self, learner: Learner, row: int) -> None:
        """One row; the run goes on as if nothing had been asked."""
        state, counted = random_state(learner.generator), dict(learner.flops.rows)
        try:
            for questions in self.questions:
                found = self.rows(questions)
                found[row:] = [None] * (row - len(found))
                found.append(questions.accuracy(learner, self.batch_size))
        finally:
            set_random_state(state, learner.generator)
            learner.flops.rows = counted


def check_prompting(backbone: Any, info: StreamInfo) -> None:
    """Can this model be prompted?

    Raises:
        ClplatformError: it is no causal language model, or needs to know the task.
    """
    if not info.predicts_text or "causal_lm" not in getattr(backbone, "problems", ()):
        raise ClplatformError(
            f"prompting asks causal language models, and stream={info.name} is {info.problem}; choose a stream of texts that "
            "are gone on with and a backbone such as transformer_decoder or gpt2, or leave prompting=null"
        )
    if info.task_ids:
        raise ClplatformError(
            f"prompting: its tasks have no task id, which stream={info.name} offers at inference; give "
            "stream.scenario=domain_incremental"
        )
