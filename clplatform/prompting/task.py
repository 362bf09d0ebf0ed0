"""A labelled task as prompts: a file of texts with labels, a template, and the words that stand for a label.

    example_1 (with its label) · … · example_k · template with the text | words of a label

What follows the bar is scored, for each label. Spaces at the end of the template go with the words, as tokenizers have them.
Importing this file imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Ge

from clplatform.stream.tables import read_table
from clplatform.types import ClplatformError

# Texts that say nothing (Zhao et al. 2021, Sec. 5), by which a model's liking for a label is measured.
CONTENT_FREE = ("N/A", "[MASK]", "")


class PromptedTask:
    """A task of texts and labels.

    Args:
        name: of the task, in the configuration and the record.
        test: file (JSONL, CSV, TSV, Parquet) of the samples that are asked.
        template: has `{text}` and ends with `{label}`.
        verbalisers: label → the words that are scored for it.
        train: file that examples are drawn from; needed if there are `shots`.
        text_column, label_column: of both files.
        shots: examples in front of each prompt, the same for all; 0: zero-shot.
        separator: between examples, and between the last one and the prompt.
        seed: of the draw.
        limit: samples that are asked at most: the first; None: all.
        normalised: divide a log-likelihood by the number of its tokens (Brown et al. 2020, Sec. 2.4), or take the total.
        calibrated: divide the probabilities of labels by those that texts without content get (Zhao et al. 2021, Sec. 5).

    Raises:
        ClplatformError: the settings do not fit each other.
    """

    def __init__(
        self,
        *,
        name: str,
        test: str,
        template: str,
        verbalisers: dict[str, str],
        train: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        shots: Annotated[int, Ge(0)] = 0,
        separator: str = "\n\n",
        seed: Annotated[int, Ge(0)] = 0,
        limit: Annotated[int, Ge(1)] | None = None,
        normalised: bool = True,
        calibrated: bool = False,
    ) -> None:
        where = f"prompting.{name}"
        if template.count("{text}") != 1 or template.count("{label}") != 1 or not template.endswith("{label}"):
            raise ClplatformError(
                f"{where}.template={template!r}: it needs {{text}} once, and {{label}} once, at its end"
            )
        words = list(verbalisers.values())
        if len(words) < 2 or len(set(words)) < len(words) or not all(isinstance(w, str) and w.strip() for w in words):
            raise ClplatformError(f"{where}.verbalisers: give two labels or more, each with words of its own")
        if shots and train is None:
            raise ClplatformError(
                f"{where}.shots={shots}: examples are drawn from prompting.{name}.train, which is missing"
            )
        self.name, self.test, self.train, self.template, self.verbalisers = name, test, train, template, verbalisers
        self.text_column, self.label_column, self.shots, self.separator = text_column, label_column, shots, separator
        self.seed, self.limit, self.normalised, self.calibrated = seed, limit, normalised, calibrated

    @property
    def labels(self) -> list[str]:
        return list(self.verbalisers)

    def read(self, path: str) -> tuple[list[str], list[str]]:
        """Texts and labels of a file.

        Raises:
            ClplatformError: it is missing or malformed, or has a label without words; with the line.
        """
        table = read_table(path, [self.text_column, self.label_column])
        if not table.lines:
            raise ClplatformError(f"{path} holds no rows")
        texts, labels = table.columns[self.text_column], [str(v) for v in table.columns[self.label_column]]
        for line, text, label in zip(table.lines, texts, labels, strict=True):
            if label not in self.verbalisers:
                raise ClplatformError(
                    f"{path}:{line}: the label {label!r} has no words in prompting.{self.name}.verbalisers (there is: "
                    f"{', '.join(self.verbalisers)})"
                )
            if not isinstance(text, str) or not text.strip():
                raise ClplatformError(f"{path}:{line}: {self.text_column!r} is no text")
        return texts, labels

    def examples(self) -> str:
        """What is in front of every prompt.

        Raises:
            ClplatformError: the file has fewer rows than there are shots.
        """
        if self.shots == 0:
            return ""
        assert self.train is not None
        texts, labels = self.read(self.train)
        if len(texts) < self.shots:
            raise ClplatformError(f"prompting.{self.name}.shots={self.shots}: {self.train} has {len(texts)} rows")
        drawn = random.Random(self.seed).sample(range(len(texts)), self.shots)  # a generator of its own
        return "".join(self.prompt(texts[i]) + self.verbalisers[labels[i]] + self.separator for i in drawn)

    def prompt(self, text: str) -> str:
        """The template with a text, up to the label."""
        before, after = self.template.removesuffix("{label}").split("{text}")
        return before + text + after

    def choices(self, text: str, examples: str) -> tuple[str, list[str]]:
        """A prompt without spaces at its end, and what may follow: the words of each label."""
        whole = examples + self.prompt(text)
        prompt = whole.rstrip(" ")
        return prompt, [whole[len(prompt) :] + words for words in self.verbalisers.values()]


def check_tasks(tasks: Any) -> None:
    """Are the settings of `prompting` right?

    Raises:
        ClplatformError: what is wrong with them.
    """
    from clplatform.signature import check_arguments

    if not isinstance(tasks, dict) or not tasks:
        raise ClplatformError("prompting: name one task or more, each with its settings, or leave it at null")
    for name, values in tasks.items():
        if not isinstance(values, dict):
            raise ClplatformError(f"prompting.{name}: give the task its settings (test, template, verbalisers)")
        check_arguments(f"prompting.{name}", PromptedTask, values, given={"name"})
        PromptedTask(name=name, **values)


def make_tasks(tasks: dict[str, dict[str, Any]]) -> Sequence[PromptedTask]:
    return [PromptedTask(name=name, **values) for name, values in tasks.items()]
