"""The tiny world in language: three domains of a few words, and Transformers of a few thousand weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplatform.backbone.transformer.language import TransformerDecoder, TransformerSeq2Seq
from clplatform.backbone.transformer.text import TransformerText
from clplatform.data import TensorData
from clplatform.experiment import Experiment
from clplatform.fitting import Fitter
from clplatform.head.vocabulary import VocabularyHead
from clplatform.learner import Learner
from clplatform.results import Results
from clplatform.strategy.base import Chain, Strategy
from clplatform.stream.base import InMemoryStream, make_experiences
from clplatform.tuning.base import TUNED
from clplatform.tuning.lora import LoRA
from clplatform.types import IGNORED, InputSpec, StreamInfo

PAD, BOS, EOS, MASK = 0, 1, 2, 3
SYMBOLS, LENGTH = 6, 7  # words of a domain; longest text
VOCABULARY = 4 + 2 * 3 * SYMBOLS  # each domain reads its own words and, if it translates, writes others
INPUT = InputSpec(
    "text", vocab_size=VOCABULARY, pad_token_id=PAD, max_length=LENGTH + 1, bos_token_id=BOS, eos_token_id=EOS,
    max_target_length=LENGTH + 1, mask_token_id=MASK,
)  # fmt: skip


class Words:
    """A tokenizer whose words are numbers."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        texts = []
        for row in rows:
            ended = row.index(EOS) if EOS in row else len(row)
            texts.append(" ".join(f"w{token}" for token in row[:ended] if token > MASK))
        return texts

    def save_pretrained(self, folder: Path) -> None: ...


def sentences(domain: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts [n, LENGTH] whose next word follows from the last one (in this domain, by a step of its own), and their mask."""
    start = torch.randint(SYMBOLS, (n, 1), generator=generator)
    place = (start + (1 + domain) * torch.arange(LENGTH)) % SYMBOLS
    lengths = torch.randint(4, LENGTH + 1, (n, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    return (4 + SYMBOLS * domain + place).masked_fill(~mask, PAD), mask.long()


def shifted(words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is read, what follows it, and the mask, [n, LENGTH + 1], for texts that begin with BOS and end with EOS."""
    n = len(words)
    ended = torch.nn.functional.pad(words, (0, 1)).scatter(1, mask.sum(1, keepdim=True), EOS)
    longer = torch.cat([torch.ones(n, 1, dtype=torch.int64), mask], 1)
    return torch.cat([torch.full((n, 1), BOS), words], 1), ended.masked_fill(longer == 0, IGNORED), longer


def columns(problem: str, domain: int, n: int, start: int, task: int, generator: torch.Generator) -> dict[str, Tensor]:
    words, mask = sentences(domain, n, generator)
    common = {"task_labels": torch.full((n,), task), "index": torch.arange(start, start + n)}
    if problem == "causal_lm":
        read, labels, longer = shifted(words, mask)
        return {**common, "input_ids": read, "labels": labels, "attention_mask": longer, "n_bytes": 3 * longer.sum(1)}
    if problem == "masked_lm":
        hidden = (torch.rand(n, LENGTH, generator=generator) < 0.3) & mask.bool()
        hidden[:, 0] = True
        return {**common, "input_ids": words.masked_fill(hidden, MASK), "original_ids": words, "attention_mask": mask,
                "labels": words.masked_fill(~hidden, IGNORED)}  # fmt: skip
    answer = (words + 3 * SYMBOLS).masked_fill(mask == 0, PAD)
    read, labels, longer = shifted(answer, mask)
    return {**common, "input_ids": words, "attention_mask": mask, "decoder_input_ids": read, "labels": labels,
            "decoder_attention_mask": longer}  # fmt: skip


def tiny_stream(problem: str, *, task_ids: bool = False, n: int = 3, per_domain: int = 32) -> InMemoryStream:
    """An experience for each domain; a model that has learned one perfectly has a perplexity near 1 (but for the first word)."""
    generator = torch.Generator().manual_seed(3)
    parts: list[dict[str, TensorData]] = []
    texts: list[tuple[str, str]] = []
    for i in range(n):
        part = {}
        for split, size in (("train", per_domain), ("validation", 8), ("test", 12)):
            found = columns(problem, i, size, len(texts), i if task_ids else 0, generator)
            part[split] = TensorData(found)
            decode = Words().batch_decode
            target = found["labels"].masked_fill(found["labels"] == IGNORED, PAD)
            texts += zip(decode(found["input_ids"].tolist(), True), decode(target.tolist(), True), strict=True)
        parts.append(part)
    scenario = "task_incremental" if task_ids else "domain_incremental"
    info = StreamInfo(
        name="tiny", scenario=scenario, problem=problem, n_experiences=n, classes_per_experience=(0,) * n, class_names=(),  # type: ignore[arg-type]
        seed=0, input=INPUT, task_ids=task_ids, primary_metric="bleu" if problem == "seq2seq" else "perplexity",
        higher_is_better=problem == "seq2seq",
    )  # fmt: skip
    experiences = make_experiences(parts, [()] * n, scenario, vocab_size=VOCABULARY)
    return InMemoryStream(info, experiences, None, Words(), [], texts)


def tiny_backbone(problem: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "input": INPUT, "name": "tiny", "pretrained": None, "size": 16, "n_layers": 1, "n_heads": 2, "inner_size": 32, "activation": "gelu",
        "norm": "pre", "positions": "learned", "dropout": dropout, "freeze": "none",
    }  # fmt: skip
    if problem == "causal_lm":
        return TransformerDecoder(**shared, tied=True)
    if problem == "seq2seq":
        return TransformerSeq2Seq(**shared, tied=True, beams=1, length_penalty=1.0, length_ratio=None)
    return TransformerText(**shared, pooling="mean", problem=problem)


def make_language_experiment(
    folder: Path, problem: str, strategies: dict[str, Strategy], *, task_ids: bool = False, epochs: int = 2,
    dropout: float = 0.0, lr: float = 0.01, fitter: dict[str, Any] | None = None, **options: Any,
) -> Experiment:  # fmt: skip
    """An experiment in the tiny world of language."""
    stream = options.pop("stream", None) or tiny_stream(problem, task_ids=task_ids)
    backbone = options.pop("backbone", None) or tiny_backbone(problem, dropout)
    torch.manual_seed(0)
    if any(s.needs & TUNED for s in strategies.values()):
        LoRA(rank=2, alpha=4.0, dropout=0.0, targets="all").apply(backbone, stream.info.input)
    learner = Learner(
        backbone=backbone, make_head=VocabularyHead, chain=Chain(strategies), info=stream.info,
        optimizer=partial(torch.optim.Adam, lr=lr), **options,
    )  # fmt: skip
    info = stream.info
    results = Results(
        run_id="tiny", seed=0, stream={"name": "tiny", "experience_names": [e.name for e in stream], "n_experiences": len(stream)},
        backbone={"name": "tiny"}, strategy=list(strategies), code={},
        primary_metric={"name": info.primary_metric, "higher_is_better": info.higher_is_better},
    )  # fmt: skip
    settings = {"max_epochs": epochs, "accelerator": "cpu", "devices": 1}
    folder.mkdir(parents=True, exist_ok=True)
    return Experiment(
        learner=learner, stream=stream, fitter=Fitter(trainer=settings, batch_size=8, eval_batch_size=16, **(fitter or {})),
        results=results, run_dir=folder, config={"seed": 0}, seed=0,
    )  # fmt: skip
