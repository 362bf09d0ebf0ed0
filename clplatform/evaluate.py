"""Evaluation: what a model is scored by on one experience, one row of every matrix, the confusion matrix, samples.

What is measured depends on the problem. Each measure takes (learner, stream, data, batch size) and returns scores by name
(`clplatform.metric.score`); the stream's primary metric is among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clplatform.data import by_length, predicted
from clplatform.head.span import best_spans, over_windows
from clplatform.learner import Learner
from clplatform.metric.spans import OUTSIDE, scheme, span_f1, spans
from clplatform.metric.text import TEXT_SCORES
from clplatform.module.mode import eval_mode
from clplatform.types import IGNORED, Data, Experience, ExperienceInfo, Stream

Scores = dict[str, float]


@contextmanager
def evaluating(learner: Learner) -> Iterator[None]:
    """The model in eval mode, without gradients, in the run's precision; its mode is left as it was.

    inference_mode is left before anything is kept: what is returned may be used anywhere.
    """
    with eval_mode(learner), torch.inference_mode(), learner.precision_context():
        yield


# -- classification ----------------------------------------------------------------------------------------------------


def predict(learner: Learner, data: Data, batch_size: int) -> Tensor:
    """The class predicted for every sample, int64 [N] on the CPU."""
    found, (_, back) = [], by_length(data)
    with evaluating(learner):
        for batch in learner.evaluation_batches(data, batch_size):
            found.append(learner(batch).logits.argmax(1))
    return torch.cat(found).cpu()[back] if found else torch.zeros(0, dtype=torch.int64)


def accuracy(learner: Learner, data: Data, batch_size: int) -> float | None:
    """Share of samples whose class is predicted (every sample counts the same); None without samples."""
    if len(data) == 0:
        return None
    return classification(learner, None, data, batch_size)["accuracy"]


def classification(learner: Learner, stream: Stream | None, data: Data, batch_size: int) -> Scores:
    """Accuracy, and the mean F1 of the classes that the data has."""
    found, labels = predict(learner, data, batch_size), data.labels
    return {"accuracy": (found == labels).float().mean().item(), "macro_f1": macro_f1(found, labels)}


def macro_f1(found: Tensor, labels: Tensor) -> float:
    """2 · hits / (predicted + true), the mean over the classes that `labels` has; both int64 [N]."""
    k = 1 + int(torch.maximum(found, labels).max())
    right, predicted, true = (torch.bincount(x, minlength=k) for x in (labels[found == labels], found, labels))
    return (2 * right / (predicted + true))[true > 0].double().mean().item()


# -- language ----------------------------------------------------------------------------------------------------------


def language_model(learner: Learner, stream: Stream, data: Data, batch_size: int) -> Scores:
    """Perplexity, its logarithm, and bits per byte where the data says how many bytes its labels stand for."""
    nats = torch.zeros((), dtype=torch.float64)
    tokens, n_bytes = 0, 0
    with evaluating(learner):
        for batch in learner.batches(by_length(data)[0], batch_size=batch_size):
            nats += learner.task_loss(batch, learner(batch), "none").double().sum().cpu()
            tokens += int((batch["labels"] != IGNORED).sum())
            n_bytes += int(batch["n_bytes"].sum()) if "n_bytes" in batch else 0
    per_token = float(nats) / max(1, tokens)
    scores = {"perplexity": math.exp(min(per_token, 700)), "nats_per_token": per_token}
    if n_bytes:
        scores["bits_per_byte"] = float(nats) / math.log(2) / n_bytes
    return scores


def write(learner: Learner, stream: Any, data: Data, batch_size: int) -> list[tuple[str, Any, str]]:
    """Of every sample what was read, the reference (or several), and what the model writes."""
    data, back = by_length(data)
    written: list[str] = []
    indices: list[int] = []
    with evaluating(learner):
        for batch in learner.batches(data, batch_size=batch_size):
            written += decode(stream.tokenizer, learner.generate(batch))
            indices += batch["index"].tolist()
    rows = [(*stream.texts[i], text) for i, text in zip(indices, written, strict=True)]
    return [rows[place] for place in back.tolist()]


def decode(tokenizer: Any, tokens: Tensor) -> list[str]:
    """Texts of tokens [B, T], without special ones."""
    return [text.strip() for text in tokenizer.batch_decode(tokens.cpu().tolist(), skip_special_tokens=True)]


def seq2seq(learner: Learner, stream: Stream, data: Data, batch_size: int) -> Scores:
    """Scores of what the model writes, and the loss on the references."""
    rows = write(learner, stream, data, batch_size)
    references, written = [row[1] for row in rows], [row[2] for row in rows]
    primary = stream.info.primary_metric
    names = ("bleu", "chrf") if primary in ("bleu", "chrf") else ("exact_match", "rouge_l", "answer_f1")
    scores = {name: TEXT_SCORES[name](written, references) for name in dict.fromkeys((primary, *names))}
    return {**scores, "nats_per_token": language_model(learner, stream, data, batch_size)["nats_per_token"]}


# -- tokens and spans --------------------------------------------------------------------------------------------------


def token_classification(
    learner: Learner, stream: Stream, data: Data, batch_size: int, *, classes: Sequence[int] | None = None
) -> Scores:
    """Token accuracy and, where the classes mark spans, their F1.

    Args:
        classes: those that the data annotates; None: those that it has. What is predicted of others counts as `O`, if
            there is that class.
    """
    found, true, first = [], [], []
    with evaluating(learner):
        for batch in learner.batches(data, batch_size=batch_size):
            labels = batch["labels"]
            found.append(predicted(batch, learner(batch).logits.argmax(-1)).cpu())
            true.append(predicted(batch, labels).cpu())
            begins = (labels != IGNORED).cumsum(1) == 1
            first.append(predicted(batch, begins).cpu())
    names = stream.info.class_names
    labels, guesses = torch.cat(true), torch.cat(found)
    if OUTSIDE in names:
        own = labels.unique() if classes is None else torch.tensor(classes)
        guesses = guesses.masked_fill(~torch.isin(guesses, own), names.index(OUTSIDE))
    scores = {"token_accuracy": (guesses == labels).double().mean().item()}
    if (of := scheme(names)).types:
        starts = torch.cat(first).numpy()
        scores["span_f1"] = span_f1(*(spans(x.numpy(), starts, of) for x in (guesses, labels)))
    return scores


def answers(learner: Learner, stream: Any, data: Data, batch_size: int) -> list[tuple[str, Any, str]]:
    """Of every question what was read, the references, and the span that the model finds in all windows of its context."""
    data, back = by_length(data)
    found: list[tuple[Tensor, ...]] = []
    with evaluating(learner):
        for batch in learner.batches(data, batch_size=batch_size):
            ends, score, none = (x.cpu() for x in best_spans(learner(batch).logits))
            index = batch["index"].cpu()
            question = batch["question"].cpu() if "question" in batch else index
            found.append((question, score, none, index, ends))
    question, score, none, index, ends = (torch.cat(column)[back] for column in zip(*found, strict=True))
    window, answered = over_windows(question, score, none)
    places = stream.offsets[index[window, None], ends[window]]  # [Q, 2, 2]
    rows: list[tuple[str, Any, str]] = []
    for i, start, end in zip(index[window].tolist(), places[:, 0, 0].tolist(), places[:, 1, 1].tolist(), strict=True):
        read, references = stream.texts[i]
        answer = read[start:end].strip() if answered[len(rows)] else ""  # some tokens begin with a space
        rows.append((read, references, answer))
    return rows


def question_answering(learner: Learner, stream: Stream, data: Data, batch_size: int) -> Scores:
    """Scores of the answers that the model finds."""
    rows = answers(learner, stream, data, batch_size)
    references, found = [row[1] for row in rows], [row[2] for row in rows]
    return {name: TEXT_SCORES[name](found, references) for name in ("answer_f1", "exact_match")}


MEASURES: dict[str, Any] = {
    "classification": classification,
    "token_classification": token_classification,
    "question_answering": question_answering,
    "causal_lm": language_model,
    "masked_lm": language_model,
    "seq2seq": seq2seq,
}


# -- rows of the matrices ----------------------------------------------------------------------------------------------


def has_meaning(learner: Learner, experience: Experience) -> bool:
    """Can this experience be predicted yet? Not before the model has its classes; with task ids, as its task's."""
    own = [e for e in learner.seen if not learner.info.task_ids or e.task_label == experience.task_label]
    if not learner.info.has_classes:  # the vocabulary, or where an answer may be, is known from the beginning
        return bool(own) or not learner.info.task_ids
    # Of a stream without boundaries an experience shows other classes too, which it is not evaluated on.
    tested = experience.classes if learner.info.boundaries else experience.test.labels.unique().tolist()
    return set(tested) <= {c for e in own for c in e.classes}


def evaluate_row(learner: Learner, stream: Stream, split: str, batch_size: int) -> list[Scores | None]:
    """The scores on every experience of the stream's `split`; None where they have no meaning."""
    row: list[Scores | None] = []
    for experience in stream:
        data: Data | None = getattr(experience, split)
        if data is None or len(data) == 0 or not has_meaning(learner, experience):
            row.append(None)
        else:
            row.append(score(learner, stream, experience, data, batch_size))
    return row


def score(learner: Learner, stream: Stream, experience: ExperienceInfo, data: Data, batch_size: int) -> Scores:
    """The scores on data of an experience."""
    problem = learner.info.problem
    given = {"classes": experience.classes} if problem == "token_classification" else {}
    return MEASURES[problem](learner, stream, data, batch_size, **given)


def only(row: list[Scores | None], name: str) -> list[float | None]:
    """One score of every experience."""
    return [None if scores is None else scores.get(name) for scores in row]


def confusion(learner: Learner, stream: Stream, batch_size: int) -> list[list[int]] | None:
    """Counts [K][K] over the test data of all experiences that have meaning: rows true, columns predicted. None: the
    stream is not of classes."""
    if learner.info.problem != "classification":
        return None
    k = learner.n_classes
    counts = torch.zeros(k * k, dtype=torch.int64)
    for experience in stream:
        if has_meaning(learner, experience):
            cell = experience.test.labels * k + predict(learner, experience.test, batch_size)
            counts += torch.bincount(cell, minlength=k * k)
    return counts.view(k, k).tolist()


def first_samples(data: Any, n: int) -> Tensor:
    """Where the first `n` samples are, int64; all windows of the first questions, where contexts are read in several."""
    questions = getattr(data, "columns", {}).get("question")
    if questions is None:
        return torch.arange(min(n, len(data)))
    return torch.isin(questions, questions.unique()[:n]).nonzero()[:, 0]


def samples(learner: Learner, stream: Stream, batch_size: int, n: int = 3) -> list[dict[str, Any]]:
    """The first `n` test samples of every experience seen so far, with what the model writes; none where it does not."""
    if learner.info.problem not in ("seq2seq", "question_answering"):
        return []
    write_or_find = write if learner.info.problem == "seq2seq" else answers
    found = []
    for experience in list(stream)[: len(learner.seen)]:
        if not len(experience.test):
            continue
        first = experience.test.select(first_samples(experience.test, n))
        for source, reference, written in write_or_find(learner, stream, first, batch_size):
            found.append({"experience": experience.index, "source": source, "reference": reference, "written": written})
    return found
