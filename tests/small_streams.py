"""Settings for a stream of two experiences of every problem of texts, over files in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from composed import pair_stream, text_stream
from span_world import contexts, squad, write_conll


def tags(folder: Path) -> list[str]:
    folder.mkdir()
    for split, n in (("train", 40), ("test", 10)):
        write_conll(folder / f"{split}.conll", ["PER", "LOC"], n)
    return [
        "stream=token_files", f"stream.train={folder}/train.conll", f"stream.test={folder}/test.conll",
        "stream.n_experiences=2", "stream.tokenizer_vocab_size=400",
    ]  # fmt: skip


def questions(folder: Path) -> list[str]:
    folder.mkdir()
    for topic in ("color", "place"):
        (folder / f"{topic}.json").write_text(json.dumps(squad(topic, contexts(topic, 20))))
    return [
        "stream=question_answering", f"stream.data_dir={folder}", "stream.max_length=24", "stream.stride=4",
        "stream.tokenizer_vocab_size=400",
    ]  # fmt: skip


def domains(folder: Path) -> list[str]:
    folder.mkdir()
    for name in ("sea", "land"):
        (folder / f"{name}.txt").write_text("\n".join(f"the {name} is wide and number {i}" for i in range(200)))
    return [
        "stream=text_domains",
        f"stream.data_dir={folder}",
        "stream.max_length=16",
        "stream.tokenizer_vocab_size=300",
    ]


STREAMS: dict[str, Any] = {
    "text": text_stream,
    "tags": tags,
    "questions": questions,
    "pairs": pair_stream,
    "domains": domains,
}
