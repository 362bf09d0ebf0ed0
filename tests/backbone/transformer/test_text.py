"""The encoder as a backbone for texts: its features, its settings, and runs with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import TOPICS, experiment, text_stream, trained
from encoders import IMAGES, TEXTS, texts
from torch.nn import functional as F

import clplatform
from clplatform.backbone.transformer.text import TransformerText
from clplatform.cli import main
from clplatform.config import check_arguments
from clplatform.metric.flops import LENGTHS, measure
from clplatform.module.hidden import capture
from clplatform.types import ClplatformError, InputSpec

SIZES = ["backbone.size=16", "backbone.n_layers=2", "backbone.n_heads=2", "backbone.inner_size=16"]
PAGE = ["backbone=transformer_text", *SIZES]
SETTINGS: dict[str, Any] = {"pretrained": None,
    "name": "small", "size": 16, "n_layers": 3, "n_heads": 2, "inner_size": 24, "activation": "gelu", "norm": "pre",
    "positions": "learned", "pooling": "mean", "dropout": 0.0, "freeze": "none",
}  # fmt: skip
GIVEN = {"input", "load_weights", "assets"}


def backbone(*, input: InputSpec = TEXTS, seed: int = 0, **changes: Any) -> TransformerText:
    torch.manual_seed(seed)
    return TransformerText(input=input, **SETTINGS | changes).eval()


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_padding_does_not_leak_into_the_features(norm: str, positions: str, pooling: str) -> None:
    encoder, batch = backbone(norm=norm, positions=positions, pooling=pooling), texts()
    together = encoder(batch)
    assert together.shape == (4, encoder.feature_size) == (4, 16)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    assert torch.equal(encoder(other), together)
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = encoder({name: column[i : i + 1, :n] for name, column in batch.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        hidden = encoder.encoder(batch["input_ids"][i : i + 1, :n])[0]
        expected = hidden[0] if pooling == "cls" else hidden.mean(0)
        torch.testing.assert_close(together[i], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_the_order_of_tokens_counts(positions: str) -> None:
    batch = texts((6, 6))
    swapped = {**batch, "input_ids": batch["input_ids"].flip(1)}
    assert not torch.allclose(backbone(positions=positions)(batch), backbone(positions=positions)(swapped), atol=1e-5)


@torch.no_grad()
def test_blocks_are_the_embeddings_and_the_layers() -> None:
    encoder = backbone()
    with capture(encoder.blocks()) as states:
        features = encoder(texts((5,)))
    assert len(states) == len(encoder.blocks()) == 4
    torch.testing.assert_close(states[0], encoder.encoder.embeddings(texts((5,))["input_ids"])[0])
    last = F.layer_norm(states[-1], (16,), encoder.encoder.stack.norm.weight, encoder.encoder.stack.norm.bias)
    torch.testing.assert_close(features, last.mean(1))


def test_it_is_frozen_from_the_first_block() -> None:
    encoder = backbone(freeze=1, dropout=0.5).train()
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trainable == {
        n for n, _ in encoder.named_parameters() if not n.startswith(("encoder.emb", "encoder.stack.layers.0"))
    }
    assert not encoder.encoder.embeddings.dropout.training
    assert encoder.encoder.stack.layers[1].training
    assert not any(p.requires_grad for p in backbone(freeze="all").parameters())
    with pytest.raises(ClplatformError, match="freeze=4: the backbone has 3 blocks after its first part"):
        backbone(freeze=4)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_texts_of_the_stream_s_longest_fit_and_work_can_be_counted(positions: str) -> None:
    for longest in (4, 90):
        encoder = backbone(input=replace(TEXTS, max_length=longest), positions=positions)
        assert encoder(texts((longest, 2))).isfinite().all()
        assert [measure(encoder, (t,), True) > 0 for t in LENGTHS] == [True, True]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ClplatformError, match="backbone=small reads texts, but the stream is made of images"):
        backbone(input=IMAGES)
    with pytest.raises(ClplatformError, match="n_heads=3 does not divide size=16"):
        backbone(n_heads=3)
    with pytest.raises(ClplatformError, match="rotary positions need an even size, not 1"):
        backbone(n_heads=16, positions="rotary")


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", 0), ("n_layers", 0), ("activation", "silu"), ("norm", "none"), ("positions", "none"), ("pooling", "max"),
     ("dropout", 1.0), ("freeze", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(key: str, value: Any) -> None:
    check_arguments("backbone", TransformerText, SETTINGS, GIVEN)
    with pytest.raises(ClplatformError, match=rf"backbone\.{key}"):
        check_arguments("backbone", TransformerText, {**SETTINGS, key: value}, GIVEN)


# -- runs ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["backbone.positions=rotary", "backbone.norm=post"],
        ["strategy=o_lora"],
        ["strategy=adapters"],
        ["strategy=ewc"],
    ],
)
def test_a_saved_model_answers_as_the_trained_one(overrides: list[str], tmp_path: Path) -> None:
    run = trained(tmp_path / "run", *text_stream(tmp_path / "data"), *PAGE, *overrides)
    batch = run.stream[1].test.fetch(torch.arange(24))
    inputs = [f"{TOPICS[list(TOPICS)[k]][i % 4]} {i % 12}" for i, k in enumerate(batch["labels"].tolist())]
    assert torch.equal(clplatform.load(tmp_path / "run").logits(inputs), run.learner(batch).logits)


def test_adapters_are_put_into_queries_and_values(tmp_path: Path) -> None:
    run = experiment(
        tmp_path / "run", *text_stream(tmp_path / "data"), *PAGE, "strategy=o_lora", "strategy.o_lora.first=adapter"
    )
    run.learner.build(run.stream[0].info)
    adapted = {n.split(".lora_A")[0] for n, _ in run.learner.backbone.named_parameters() if "lora_A" in n}
    assert adapted == {f"encoder.stack.layers.{i}.attention.{p}_proj" for i in (0, 1) for p in "qv"}


def test_the_command_line_trains_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from command import call, only_run

    arguments = [*text_stream(tmp_path / "data"), *PAGE, "trainer.max_epochs=1", "threads=1", "tracking=local",
                 "trainer.accelerator=cpu", "strategy=finetuning"]  # fmt: skip
    done = call(capsys, *arguments)
    assert done.code == 0, done.err
    (tmp_path / "lines.txt").write_text("play some jazz\nwill it rain today\n")
    assert main(["predict", str(only_run()), str(tmp_path / "lines.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(any(f'"label": "{topic}"' in line for topic in TOPICS) for line in lines)
