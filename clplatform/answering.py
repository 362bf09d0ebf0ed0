"""What a saved model says of the words of a text: their tags, or where an answer stands. Made by `clplatform.load`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clplatform.data import predicted
from clplatform.head.span import best_spans, over_windows
from clplatform.metric.spans import scheme, spans
from clplatform.saved import Saved, check_texts
from clplatform.stream.question_tokens import tokenize_questions
from clplatform.stream.word_tokens import tokenize_words
from clplatform.types import IGNORED, ClplatformError

BATCH = 64


# -- token classification -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Words that belong together; `start` is the first of them, `end` the word after the last."""

    text: str
    type: str
    start: int
    end: int


@dataclass(frozen=True)
class Tags:
    """A sentence's words, the class of each (None: it was cut off, or is no token), and the spans that they make."""

    words: list[str]
    labels: list[str | None]
    spans: list[Span]

    def row(self) -> dict[str, Any]:
        """What `clplatform predict` prints."""
        pairs = [[word, label] for word, label in zip(self.words, self.labels, strict=True)]
        return {"spans": [vars(span) for span in self.spans], "labels": pairs}


class Tagger(Saved):
    """A model that classifies words."""

    def predict(self, inputs: Any, *, task: int | None = None, top: int = 1, batch_size: int = BATCH) -> list[Tags]:
        """The tags of sentences: texts, whose words are separated by spaces, or lists of words.

        Args:
            top: not used.
        """
        given = [inputs] if isinstance(inputs, str) else list(inputs)
        sentences = [check_texts(s.split() if isinstance(s, str) else s) for s in given]
        for i, words in enumerate(sentences):
            if not words:
                raise ClplatformError(f"sample {i}: {given[i]!r} has no words")
        assert self.info.input.max_length is not None
        columns, begins = tokenize_words(self.tokenizer, sentences, self.info.input.max_length)
        full = columns["attention_mask"].sum(1).tolist()
        last = begins.amax(1).tolist()
        longest = self.info.input.max_length
        cut = [n == longest and at + 1 < len(s) for n, at, s in zip(full, last, sentences, strict=True)]
        self.tell_cut(sum(cut), len(sentences), longest)
        columns["labels"] = begins.where(begins >= 0, IGNORED)
        found: list[Tags] = []
        with torch.inference_mode():
            for batch in self.batches(columns, task, batch_size):
                classes = predicted(batch, self.learner(batch).logits.argmax(-1)).cpu()
                sizes = (batch["labels"] != IGNORED).sum(1).tolist()
                for own, words in zip(classes.split(sizes), batch["labels"].cpu(), strict=True):
                    found.append(self._tags(sentences[len(found)], words[words != IGNORED].tolist(), own))
        return found

    def _tags(self, words: list[str], at: list[int], classes: Tensor) -> Tags:
        """Of a sentence the classes of its words number `at`."""
        names, labels = self.info.class_names, [None] * len(words)
        for word, k in zip(at, classes.tolist(), strict=True):
            labels[word] = names[k]  # type: ignore[call-overload]
        first, of = torch.arange(len(at)).numpy() == 0, scheme(names)
        made = [
            Span(" ".join(words[at[a] : at[b - 1] + 1]), of.types[kind], at[a], at[b - 1] + 1)
            for a, b, kind in spans(classes.numpy(), first, of).tolist()
        ]
        return Tags(words, labels, made)  # type: ignore[arg-type]


# -- question answering -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A part of the context, `context[start:end]`; `""` and None: there is no answer in it."""

    answer: str
    start: int | None
    end: int | None
    probability: float  # of its first token times that of its last

    def row(self) -> dict[str, Any]:
        """What `clplatform predict` prints."""
        return dict(vars(self))


class Answerer(Saved):
    """A model that finds answers in texts."""

    columns: ClassVar[list[str]] = ["question", "context"]

    def predict(self, inputs: Any, *, task: int | None = None, top: int = 1, batch_size: int = BATCH) -> list[Answer]:
        """Answers to pairs of question and context. Too long a context is read as in training: in windows, or only its
        beginning.

        Args:
            top: not used.
        """
        pairs = check_texts(inputs)
        if pairs and isinstance(pairs[0], str):
            raise ClplatformError(f"sample 0: {pairs[0]!r} is not a pair of question and context")
        assert self.info.input.max_length is not None
        windows = tokenize_questions(self.tokenizer, pairs, self.info.input.max_length, self.settings.get("stride"))
        self.tell_cut(windows.n_cut, len(pairs), self.info.input.max_length)
        found: list[tuple[Tensor, ...]] = []
        with torch.inference_mode():
            for batch in self.batches(windows.columns, task, batch_size):
                logits = self.learner(batch).logits.float()
                ends, score, none = best_spans(logits)
                likely = logits.softmax(2)
                spans = likely.gather(2, ends[:, :, None])[:, :, 0].prod(1)
                found.append((score, none, ends, spans, likely[:, :, 0].prod(1)))
        if not found:
            return []
        score, none, ends, spans, nothing = (torch.cat(column).cpu() for column in zip(*found, strict=True))
        window, answered = over_windows(windows.pair, score, none)
        answers = []
        for pair, w, has_answer in zip(pairs, window.tolist(), answered.tolist(), strict=True):
            (a, b), offsets = ends[w].tolist(), windows.offsets[w]
            places = (int(offsets[a, 0]), int(offsets[b, 1])) if has_answer else (0, 0)
            answers.append(_answer(pair, *places, float((spans if has_answer else nothing)[w])))
        return answers


def _answer(pair: tuple[str, str], start: int, end: int, probability: float) -> Answer:
    """Of places in `<question>\\n<context>`; some tokens begin with a space, which is no part of an answer."""
    context, shift = pair[1], len(pair[0]) + 1
    text = context[max(0, start - shift) : max(0, end - shift)]
    if not text.strip():
        return Answer("", None, None, probability)
    start += len(text) - len(text.lstrip()) - shift
    return Answer(text.strip(), start, start + len(text.strip()), probability)
