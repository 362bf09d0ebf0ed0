"""Small files of tagged words and of questions, and runs over them that are built as from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from composed import configuration

from clplatform.run import assemble, execute

NAMES = {
    "PER": ["Ada", "Bob Ray", "Cleo", "Dan Fox"], "LOC": ["Rome", "New York", "Oslo", "Cape Town"],
    "ORG": ["Acme", "Big Bank", "Cern", "Dot Org"], "DAY": ["Monday", "May Day", "Friday", "New Year"],
}  # fmt: skip
PATTERNS = ["{} met {} at noon", "yesterday {} saw {}", "{} and also {} .", "why is {} near {} ?"]
SMALL = [
    "backbone=transformer_text", "backbone.size=16", "backbone.n_layers=1", "backbone.n_heads=2", "backbone.inner_size=32",
    "backbone.dropout=0.0", "optimizer.lr=0.01", "stream.tokenizer_vocab_size=400",
]  # fmt: skip


def sentence(types: list[str], i: int) -> tuple[list[str], list[str]]:
    """The i-th sentence with two spans of these types: words and tags."""
    kinds = types[i % len(types)], types[(i // 2 + 1) % len(types)]
    first, second = (NAMES[k][(i // 3 + j) % 4].split() for j, k in enumerate(kinds))
    words, tags = [], []
    for word in PATTERNS[i % 4].format("@0", "@1").split():
        own = {"@0": (first, kinds[0]), "@1": (second, kinds[1])}.get(word)
        words += own[0] if own else [word]
        tags += [f"{'I' if n else 'B'}-{own[1]}" for n in range(len(own[0]))] if own else ["O"]
    return words, tags


def write_conll(path: Path, types: list[str], n: int, start: int = 0) -> str:
    rows = []
    for i in range(start, start + n):
        rows += [f"{w} x {t}" for w, t in zip(*sentence(types, i), strict=True)] + [""]
    path.write_text("-DOCSTART- -X- O\n\n" + "\n".join(rows))
    return str(path)


def squad(topic: str, contexts: list[str], *, impossible: bool = False) -> dict[str, Any]:
    """Questions on what follows the word `topic` in each context, its last question without an answer if `impossible`."""
    paragraphs = []
    for i, context in enumerate(contexts):
        start = context.index(topic) + len(topic) + 1
        answer = context[start:].split()[0]
        qas = [
            {
                "id": f"{topic}{i}",
                "question": f"what is {topic} ?",
                "answers": [{"text": answer, "answer_start": start}],
            }
        ]
        if impossible:
            qas.append({"id": f"no{i}", "question": "what is nothing ?", "is_impossible": True, "answers": []})  # type: ignore[dict-item]
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "x", "data": [{"title": topic, "paragraphs": paragraphs}]}


def contexts(topic: str, n: int) -> list[str]:
    words = ["red", "blue", "green", "sand", "stone", "grass", "river", "hill"]
    generator = torch.Generator().manual_seed(len(topic))
    found = []
    for i in range(n):
        order = [words[k] for k in torch.randperm(8, generator=generator)[:6].tolist()]
        order.insert(1 + i % 4, topic)
        found.append(" ".join(order))
    return found


def files(problem: str, folder: Path) -> list[str]:
    """Settings for a stream of this problem over files in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if problem == "token_classification":
        types = list(NAMES)
        train, test = write_conll(folder / "train.conll", types, 48), write_conll(folder / "test.conll", types, 12, 100)
        return ["stream=token_files", f"stream.train={train}", f"stream.test={test}", "stream.n_experiences=2"]
    for topic in ("color", "place"):
        (folder / f"{topic}.json").write_text(json.dumps(squad(topic, contexts(topic, 150))))
    return ["stream=question_answering", f"stream.data_dir={folder}", "stream.max_length=32"]


def config(problem: str, folder: Path, *overrides: str) -> dict[str, Any]:
    return configuration(*files(problem, folder / "data"), *SMALL, *overrides)


def run(problem: str, folder: Path, *overrides: str) -> Any:
    """The results of a run; its model is in `<folder>/run/model`."""
    return execute(config(problem, folder, *overrides), folder / "run", quiet=True)


def experiment(problem: str, folder: Path, *overrides: str) -> Any:
    """The experiment before its run."""
    made, _, _ = assemble(config(problem, folder, *overrides), folder / "run", resume=False, notices=(), quiet=True)
    made.learner.build(made.stream[0].info)
    return made
