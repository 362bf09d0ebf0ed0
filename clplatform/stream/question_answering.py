"""Extractive question answering: a question and a text in which its answer stands, one domain after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from clplatform.data import TensorData
from clplatform.stream.base import InMemoryStream, make_experiences, task_label
from clplatform.stream.image_files import data_folder, missing
from clplatform.stream.language import choose
from clplatform.stream.notes import left_out, limited
from clplatform.stream.question_tokens import Windows, tokenize_questions
from clplatform.stream.squad import SUFFIX, Question, QuestionDomain, json_files, name_squads, read_questions
from clplatform.stream.text_domains import find_path
from clplatform.stream.train_tokenizer import train_tokenizer
from clplatform.types import IGNORED, ClplatformError, InputSpec, StreamInfo

Fraction = Annotated[float, Ge(0), Lt(1)]


def question_answering(
    *, name: str, data_dir: str | None, paths: list[str] | None, domains: list[str] | None,
    scenario: Literal["domain_incremental", "task_incremental"], seed: Annotated[int, Ge(0)] | None,
    validation_fraction: Fraction, test_fraction: Fraction, limit: Annotated[int, Ge(1)] | None,
    max_length: Annotated[int, Ge(16)], stride: Annotated[int, Ge(0)] | None, tokenizer_vocab_size: Annotated[int, Ge(100)],
    tokenizer_on: Literal["first", "all"], tokenizer: Any = None,
) -> InMemoryStream:  # fmt: skip
    """Questions in SQuAD's format, with or without such that have no answer; an experience for each domain.

    Args:
        paths: each a domain: a file, or a folder of files; as they are, in `data_dir` or in `$CLPLATFORM_DATA`. None: all
            files and folders of `data_dir`.
        domains: names in the order of the experiences; None: all, in the order of `paths` or else of their names, or
            shuffled by `seed`.
        validation_fraction, test_fraction: see `read_questions`.
        limit: training questions of a domain at most: the first.
        max_length: tokens of question and context.
        stride: see `tokenize_questions`.
        tokenizer: of the pretrained backbone, given by the platform; None: one is trained.

    Raises:
        ClplatformError: a file is missing or malformed, or holds too little.
    """
    notes: list[str] = []
    found = name_squads([find_path(p, data_dir) for p in paths] if paths else _in_folder(data_dir, notes))
    chosen = [
        read_questions(d, found[d], validation_fraction=validation_fraction, test_fraction=test_fraction)
        for d in choose(list(found), domains, seed, name)
    ]
    for domain in chosen:
        first = domain.train[:limit]
        notes += domain.notes
        notes += limited("limit", len(first), len(domain.train), f"training questions of {domain.name}")
        domain.train = first
    if tokenizer is None:
        tokenizer = _train(chosen if tokenizer_on == "all" else chosen[:1], tokenizer_vocab_size, tokenizer_on, notes)
    encode = Encode(tokenizer, max_length, stride)
    parts = [encode.domain(domain, task_label(scenario, i)) for i, domain in enumerate(chosen)]
    info = StreamInfo(
        name=name,
        scenario=scenario,
        problem="question_answering",
        n_experiences=len(parts),
        classes_per_experience=(0,) * len(parts),
        class_names=(),
        seed=-1 if seed is None else seed,
        input=InputSpec("text", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_length=max_length),
        task_ids=scenario == "task_incremental",
        primary_metric="answer_f1",
    )
    experiences = make_experiences(parts, [()] * len(parts), scenario, [d.name for d in chosen], vocab_size=max_length)
    return InMemoryStream(
        info, experiences, None, tokenizer, [*notes, *encode.notes()], encode.texts, encode.all_offsets()
    )


def _in_folder(data_dir: str | None, notes: list[str]) -> list[Path]:
    folder = data_folder("question_answering", data_dir)
    if folder is None:
        raise missing(
            "question_answering", "a .json file in SQuAD's format, or a folder of such files, for each domain"
        )
    there = sorted(folder.iterdir())
    found = [p for p in there if SUFFIX.search(p.name) or (p.is_dir() and json_files(p))]
    if not found:
        raise ClplatformError(
            f"{folder} holds no questions: each .json file in it, or folder of such files, is a domain"
        )
    others = [p for p in there if p not in found and not p.name.startswith(".")]
    notes += left_out(f"files and folders of {folder.name} without a .json file", others, folder)
    return found


def _train(domains: Sequence[QuestionDomain], vocab_size: int, on: str, notes: list[str]) -> Any:
    """A byte-level BPE tokenizer of the training questions and contexts."""
    texts = list(dict.fromkeys(t for d in domains for q in d.train for t in (q.text, q.context)))
    tokenizer = train_tokenizer("bpe", texts, vocab_size, problem="question_answering")
    whose = (
        "the first experience's training questions" if on == "first" else "the training questions of all experiences"
    )
    notes.append(f"byte-level BPE tokenizer with {len(tokenizer)} tokens trained on {whose} and their contexts")
    return tokenizer


@dataclass
class Encode:
    """Questions as columns; keeps what answers are read from, and counts what was cut. Sample ids count up in the order of
    the calls."""

    tokenizer: Any
    max_length: int
    stride: int | None = None
    texts: list[tuple[str, str | list[str]]] = field(default_factory=list)
    offsets: list[Tensor] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def domain(self, domain: QuestionDomain, task: int) -> dict[str, TensorData | None]:
        """The splits of a domain."""
        part: dict[str, TensorData | None] = {"validation": None}
        for split, questions in domain.splits().items():
            part[split] = self(questions, task, train=split == "train")
        if part["train"] is None or not len(part["train"]):
            raise ClplatformError(
                f"the domain {domain.name!r}: no answer to a training question is within stream.max_length={self.max_length} "
                "tokens; give more"
            )
        return part

    def __call__(self, questions: list[Question], task: int, *, train: bool) -> TensorData:
        """`labels` [N, 2] are the tokens at which the first answer begins and ends, (0, 0) if there is none. Where contexts
        are cut, an answer that was cut away cannot be learned: such rows are left out of the training data, and have no
        labels elsewhere. Where they are read in windows, a row is a window, and one without the whole answer has none;
        `question` [N] says to which question it belongs."""
        found = tokenize_questions(
            self.tokenizer, [(q.text, q.context) for q in questions], self.max_length, self.stride
        )
        labels = self._labels(questions, found)
        lost = labels[:, 0] == IGNORED
        first, n = len(self.texts), len(found.pair)
        index = torch.arange(first, first + n)
        self.texts += [(f"{q.text}\n{q.context}", q.references) for q in (questions[i] for i in found.pair.tolist())]
        self.offsets.append(found.offsets)
        self._note(questions, found, lost, train=train)
        columns = {**found.columns, "labels": labels, "task_labels": torch.full_like(index, task), "index": index}
        if self.stride is not None:
            labels[lost] = 0
            return TensorData({**columns, "question": first + found.pair})
        whole = TensorData(columns)
        return whole.select((~lost).nonzero()[:, 0]) if train and lost.any() else whole

    def _note(self, questions: list[Question], found: Windows, lost: Tensor, *, train: bool) -> None:
        what = "training" if train else "validation and test"
        n = len(questions)
        if self.stride is None:
            self._count(f"questions and contexts are cut to stream.max_length={self.max_length} tokens", found.n_cut)
            left_out = ", and their questions left out" if train else ""
            self._count(f"{what} answers are cut away{left_out}", int(lost.sum()))
        else:
            several = int((found.pair.bincount(minlength=n) > 1).sum())
            seen = torch.zeros(n, dtype=torch.bool).index_fill(0, found.pair[~lost], True)
            self._count(f"contexts are read in several windows of stream.max_length={self.max_length} tokens", several)
            self._count(f"questions are cut to {self.max_length // 2} tokens", found.n_cut)
            self._count(f"{what} answers are in no window as a whole", int((~seen).sum()))
        self._count("questions", n)

    def _count(self, what: str, n: int) -> None:
        self.counts[what] = self.counts.get(what, 0) + n

    def _labels(self, questions: list[Question], found: Windows) -> Tensor:
        """int64 [N, 2]; `IGNORED` where there is an answer, and not in the window."""
        own = found.pair
        answered = torch.tensor([bool(q.answers) for q in questions])[own]
        ends = [(q.answers[0][1], q.answers[0][1] + len(q.answers[0][0])) if q.answers else (0, 0) for q in questions]
        shift = torch.tensor([len(q.text) + 1 for q in questions])
        start, end = ((torch.tensor([e[i] for e in ends]) + shift)[own] for i in (0, 1))
        open_, offsets = found.columns["answerable"].bool(), found.offsets
        open_[:, 0] = False
        within = open_ & (offsets[:, :, 1] > start[:, None]) & (offsets[:, :, 0] < end[:, None])
        begins = offsets[:, :, 0].masked_fill(~open_, torch.iinfo(torch.int64).max).amin(1) <= start
        begins |= torch.cat([torch.tensor([True]), own[1:] != own[:-1]])[
            : len(own)
        ]  # the first window has the beginning
        reached = begins & (offsets[:, :, 1].amax(1) >= end) & within.any(1)
        n = within.shape[1]
        first = within.int().argmax(1)
        last = n - 1 - within.flip(1).int().argmax(1)
        labels = torch.stack([first, last], 1)
        labels[~reached] = IGNORED
        labels[~answered] = 0
        return labels

    def all_offsets(self) -> Tensor:
        """int64 [N, T, 2], by sample id."""
        n = max(o.shape[1] for o in self.offsets)
        return torch.cat([F.pad(o, (0, 0, 0, n - o.shape[1])) for o in self.offsets])

    def notes(self) -> list[str]:
        """What the report must say was cut."""
        n = self.counts.pop("questions")
        return [f"{count} of {n} {what}" for what, count in self.counts.items() if count]
