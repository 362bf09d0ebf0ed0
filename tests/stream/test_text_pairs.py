"""Targets of pretrained encoder-decoders stand as their makers trained them, so that losses are Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from writers import BART, CONFIGS, writer

from clplatform.backbone.pretrained import decoder_start
from clplatform.build import build_tokenizer
from clplatform.stream.text_pairs import Pairs, Part, pair_stream
from clplatform.stream.train_tokenizer import train_bpe
from clplatform.types import IGNORED

TEXTS = ["one two three", "four", "five six seven eight nine ten", "two four"]


def stream(tokenizer: Any, **changes: Any) -> Any:
    part = Part("a", Pairs(TEXTS, list(reversed(TEXTS))), None, Pairs(TEXTS[:1], TEXTS[:1]))
    settings: dict[str, Any] = {
        "metric": "bleu", "scenario": "domain_incremental", "seed": None, "validation_fraction": 0.0, "max_length": 32,
        "max_target_length": 64, "vocab_size": 300, "on": "first", "tokenizer": tokenizer,
    }  # fmt: skip
    return pair_stream("pairs", [part], **{**settings, **changes})


def pretrained(kind: str, folder: Path) -> Any:
    """A saved model of this kind with a tokenizer that adds to a target what that kind's does; the tokenizer as a run has it."""
    from tokenizers import processors

    tokenizer = train_bpe(TEXTS, 300, frame=True)
    if kind != "bart":  # T5 and Marian end with </s> and begin with nothing
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
    start = {"bart": 2, "t5": 0, "marian": 0}[kind]
    values = {**CONFIGS[kind], "max_position_embeddings": 70} if kind != "t5" else CONFIGS[kind]
    spec = stream(None).info.input
    backbone = writer(kind, input=spec, config={"model_type": kind, **values})
    backbone.config.decoder_start_token_id = start
    backbone.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    page = {"_target_": "clplatform.backbone.huggingface_language.HuggingFaceSeq2Seq", "pretrained": str(folder)}
    return build_tokenizer({"stream": {"_target_": "clplatform.stream.text_to_text.text_to_text"}, "backbone": page})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bart", "t5", "marian"])
def test_the_loss_is_hugging_face_s(kind: str, tmp_path: Path) -> None:
    tokenizer = pretrained(kind, tmp_path)
    made = stream(tokenizer)
    backbone = writer(kind, input=made.info.input, config=None, pretrained=str(tmp_path))
    batch = made[0].train.fetch(torch.arange(4))
    rows = [torch.tensor(row) for row in tokenizer(text_target=list(reversed(TEXTS)))["input_ids"]]
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    theirs = backbone.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    logits = backbone.projection(backbone(batch))
    assert torch.equal(batch["labels"], labels)
    assert batch["decoder_input_ids"][:, 0].tolist() == [{"bart": 2, "t5": 0, "marian": 0}[kind]] * 4
    assert made.info.input.bos_token_id == batch["decoder_input_ids"][0, 0]
    ours = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(ours, theirs.loss, rtol=1e-5, atol=1e-6)
    assert backbone.generate(batch).shape[0] == 4


def test_a_target_that_is_cut_still_ends(tmp_path: Path) -> None:
    made = stream(pretrained("bart", tmp_path), max_target_length=6)
    labels = made[0].train.fetch(torch.arange(4))["labels"]
    assert labels.shape == (4, 6)
    assert [row[row != IGNORED][-1].item() for row in labels] == [2] * 4
    assert labels[:, 0].tolist() == [1] * 4  # <s>, as BART was trained
    assert "targets are cut to stream.max_target_length=6 tokens" in made.notes[-1]


def test_a_configuration_may_say_another_start(tmp_path: Path) -> None:
    pretrained("bart", tmp_path)
    page = {
        "_target_": "clplatform.backbone.huggingface_language.HuggingFaceSeq2Seq", "pretrained": str(tmp_path),
        "config": {"decoder_start_token_id": 7},
    }  # fmt: skip
    tokenizer = build_tokenizer(
        {"stream": {"_target_": "clplatform.stream.text_to_text.text_to_text"}, "backbone": page}
    )
    assert stream(tokenizer).info.input.bos_token_id == 7


def test_with_random_weights_a_target_starts_from_bos() -> None:
    made = stream(None)
    batch = made[0].train.fetch(torch.arange(4))
    backbone = writer(
        "bart", input=made.info.input, config={"model_type": "bart", **BART, "max_position_embeddings": 64}
    )
    assert batch["decoder_input_ids"][:, 0].tolist() == [made.tokenizer.bos_token_id] * 4
    assert (batch["labels"] != made.tokenizer.bos_token_id).all()
    assert backbone(batch).shape[:2] == batch["labels"].shape


def test_a_run_of_ours_starts_from_bos_as_it_did(tmp_path: Path) -> None:
    (tmp_path / "clplatform.json").write_text("{}")
    assert decoder_start(str(tmp_path), {}) is None
