"""The tiny world in text: classes that are told apart by their words, and a BERT of a few thousand weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clplatform.backbone.huggingface import HuggingFaceText
from clplatform.check.world import TinyBackbone, TinyStream, make_experiment
from clplatform.data import TensorData
from clplatform.experiment import Experiment
from clplatform.strategy.base import Strategy
from clplatform.types import InputSpec

WORDS, LENGTH = 8, 9  # words of each class; longest text
INPUT = InputSpec("text", vocab_size=1 + 6 * WORDS, pad_token_id=0, max_length=LENGTH)


class TinyTextStream(TinyStream):
    """The same experiences, with texts of 3 to 9 tokens; class k has the tokens 1 + 8k … 8 + 8k."""

    def __init__(self, n: int = 3, *, scenario: str = "class_incremental", per_class: int = 16):
        super().__init__(n, scenario=scenario, per_class=per_class)
        self.info = replace(self.info, input=INPUT)
        generator = torch.Generator().manual_seed(11)
        self.experiences = [
            replace(e, train=texts(e.train, e.index, generator), validation=texts(e.validation, e.index, generator),
                    test=texts(e.test, e.index, generator))
            for e in self.experiences
        ]  # fmt: skip


def texts(data: Any, experience: int, generator: torch.Generator) -> TensorData:
    """The same labels, with texts for inputs."""
    columns = {name: column for name, column in data.columns.items() if name != "pixel_values"}
    shape = len(data), LENGTH
    group = 2 * experience + columns["labels"] % 2
    words = 1 + WORDS * group[:, None] + torch.randint(WORDS, shape, generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (len(data), 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return TensorData({**columns, "input_ids": words * mask, "attention_mask": mask})


def tiny_bert() -> HuggingFaceText:
    """One layer, features [B, 16] like the tiny world's."""
    torch.manual_seed(0)
    return HuggingFaceText(
        input=INPUT, name="tiny", pretrained=None, package=None, pooling="mean", dropout=0.0, attention="sdpa",
        freeze="none", config={
            "model_type": "bert", "hidden_size": TinyBackbone.feature_size, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16,
        },
    )  # fmt: skip


def make_text_experiment(folder: Path, strategies: dict[str, Strategy], **options: Any) -> Experiment:
    """An experiment in the tiny world with texts."""
    options.setdefault("stream", TinyTextStream())
    experiment = make_experiment(folder, strategies, **options)
    experiment.learner.backbone = tiny_bert()
    experiment.learner.flops.watch(experiment.learner.backbone)
    return experiment
