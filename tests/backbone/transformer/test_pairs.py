"""A decoder that learns pairs of texts: a row of a batch is what it is alone, and what is written is the likeliest token, again
and again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_world import (
    BOS,
    EOS,
    INPUT,
    PAD,
    make_language_experiment,
    tiny_stream,
)
from strategies import from_page

from clplatform.backbone import prefix_lm
from clplatform.backbone.transformer.language import TransformerDecoder
from clplatform.types import IGNORED


def decoder(positions: str = "learned") -> Any:
    torch.manual_seed(0)
    return TransformerDecoder(
        input=INPUT, name="tiny", pretrained=None, size=16, n_layers=2, n_heads=2, inner_size=32, activation="gelu",
        norm="pre", positions=positions, tied=True, dropout=0.0, freeze="none", problem="seq2seq",  # type: ignore[arg-type]
    ).eval()  # fmt: skip


def rows(n: int = 8) -> tuple[Any, list[list[int]], list[list[int]]]:
    """A batch of pairs of several lengths; sources and targets without padding."""
    batch = tiny_stream("seq2seq")[0].train.fetch(torch.arange(n))
    sources = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    targets = [row[row != IGNORED].tolist() for row in batch["labels"]]
    assert len({len(s) for s in sources}) > 1
    return batch, sources, targets


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary", "sinusoidal"])
def test_a_target_s_features_are_those_of_its_text_alone(positions: str) -> None:
    backbone = decoder(positions)
    batch, sources, targets = rows()
    found = backbone(batch)
    assert found.shape == (*batch["decoder_input_ids"].shape, 16)
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        text = torch.tensor([[*source, BOS, *target[:-1]]])
        alone = backbone.model.decoder(text)[0, len(source) :]
        torch.testing.assert_close(found[i, : len(target)], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_what_is_written_is_the_likeliest_token_again_and_again(positions: str) -> None:
    backbone = decoder(positions)
    batch, sources, _ = rows()
    found = backbone.generate(batch)
    assert found.shape[1] <= INPUT.max_target_length
    for i, source in enumerate(sources):
        text = [*source, BOS]
        for _ in range(found.shape[1]):
            text.append(int(backbone.projection(backbone.model.decoder(torch.tensor([text]))[0, -1]).argmax()))
            if text[-1] == EOS:
                break
        written = text[len(source) + 1 :]
        assert found[i].tolist() == written + [PAD] * (found.shape[1] - len(written))


def test_prompts_are_padded_on_the_left() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    ids, mask = prefix_lm.prompts(batch, 9)
    assert (ids * mask).tolist() == [[5, 6, 7, 9], [0, 0, 8, 9]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_a_decoder_learns_to_translate_as_an_encoder_decoder_does(tmp_path: Path) -> None:
    strategies = {"finetuning": from_page("finetuning")}
    experiment = make_language_experiment(tmp_path, "seq2seq", strategies, epochs=45, backbone=decoder().train(),
                                          stream=tiny_stream("seq2seq", n=2))  # fmt: skip
    matrix: Any = experiment.run().matrix
    assert matrix[0][0] < 0.1 and matrix[1][0] > 0.8  # BLEU
    assert matrix[2][1] > 0.5 and matrix[2][0] < 0.2  # and it forgets


def test_a_language_model_s_positions_are_as_many_as_before() -> None:
    plain = replace(INPUT, max_length=40)
    made = TransformerDecoder(
        input=plain, name="tiny", pretrained=None, size=16, n_layers=1, n_heads=2, inner_size=32, activation="gelu",
        norm="pre", positions="learned", tied=True, dropout=0.0, freeze="none",
    )  # fmt: skip
    assert [len(p) for p in made.model.decoder.embeddings.position.parameters()] == [40]
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "decoder_input_ids": torch.ones(2, 3, dtype=torch.int64)}
    assert made({**batch, "attention_mask": torch.ones_like(batch["input_ids"])}).shape == (2, 5, 16)
