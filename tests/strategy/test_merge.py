"""Merging: the model does what it did, a loop that moves W by B A itself, and what begins anew."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, only_run, refused
from composed import SMALL, VIT, configuration, trained
from naive import Recorder
from strategies import from_page
from torch import nn
from torch.nn import functional as F
from tuned import encoder, shake
from tuned import from_page as from_tuning_page
from world import TinyStream, make_experiment
from writers import SPEC, pairs

from clplatform.build import make
from clplatform.files import read_json
from clplatform.module import lora, scales
from clplatform.strategy.base import Chain
from clplatform.strategy.merge import Merge
from clplatform.tuning.lora import LoRA

Capture = pytest.CaptureFixture[str]
SGD = partial(torch.optim.SGD, lr=0.1)
LAYER = "backbone.layer."


class Model(nn.Module):
    """What the strategy is given, for a backbone alone."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.generator = backbone, torch.Generator().manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_the_model_does_what_it_did_and_begins_anew(name: str, kind: str) -> None:
    options = {} if name == "ia3" else {"targets": "all", "alpha": 6.0}
    tuned, batch = encoder(kind, name, **options)
    bare, _ = encoder(kind)
    learner: Any = Model(tuned)
    biases = [[p for n, p in m.named_parameters() if n.endswith("bias")] for m in (tuned, bare)]
    for a, b in zip(*biases, strict=True):  # they begin as zeros, of which any multiple is right
        b.copy_(a.normal_(std=0.5))
    assert torch.allclose(tuned(batch), bare(batch), atol=1e-6)
    for seed in (1, 2):  # twice: what was merged is merged for good
        shake(tuned, seed=seed, scale=0.1)
        expected = tuned(batch)
        assert not torch.allclose(expected, bare(batch), atol=1e-3)
        Merge().after_experience(learner, None)  # type: ignore[arg-type]
        torch.testing.assert_close(tuned(batch), expected, rtol=1e-4, atol=1e-5)
        for layer in lora.layers(tuned):
            assert not layer.lora_B["shared"].weight.any()
            assert layer.lora_A["shared"].weight.any()
        for layer in scales.layers(tuned):
            assert (layer.ia3_l["shared"] == 1).all()
    own = {
        n.replace(".base_layer", ""): t for n, t in tuned.state_dict().items() if "lora_" not in n and "ia3_l" not in n
    }
    bare.load_state_dict(own)  # a model without adapters is left
    torch.testing.assert_close(bare(batch), tuned(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["transformer_decoder", "transformer_seq2seq"])
@pytest.mark.parametrize("tuning", ["lora", "dora", "ia3"])
@torch.no_grad()
def test_a_writer_of_ours_says_what_it_said(tuning: str, name: str) -> None:
    """Its output layer has the weight of its embeddings, which a merge must leave alone."""
    node = {k: v for k, v in configuration(f"backbone={name}")["backbone"].items() if k != "lr"}
    backbone = make(
        {**node, "size": 16, "n_layers": 2, "n_heads": 2, "inner_size": 24, "dropout": 0.0}, input=SPEC
    ).eval()
    options = {} if tuning == "ia3" else {"targets": "all"}
    from_tuning_page(tuning, **options).apply(backbone, SPEC)
    batch, before = pairs(), [t.clone() for t in backbone.projection.parameters()]
    shake(backbone, scale=0.1)
    expected = backbone.projection(backbone(batch))
    Merge().after_experience(Model(backbone), None)  # type: ignore[arg-type]
    torch.testing.assert_close(backbone.projection(backbone(batch)), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.projection.parameters(), strict=True))


def test_what_has_to_be_kept_is_all_of_the_backbone(tmp_path: Path, capsys: Capture) -> None:
    done = call(capsys, *SMALL, *VIT, "stream.n_experiences=2", "tuning=lora", "strategy=merge", "threads=1")
    assert done.code == 0, done.err
    backbone = read_json(only_run() / "results.json")["backbone"]
    assert backbone["trainable_bytes"] == 4 * backbone["parameters"] > 4 * backbone["trainable_parameters"]


def test_gpt_2_s_transposed_layers_are_merged_too() -> None:
    from transformers import GPT2Config, GPT2Model

    backbone: Any = GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30)).eval()
    lora.add_adapter(backbone, "shared", rank=2, alpha=4.0, dropout=0.0)
    lora.activate(backbone, ["shared"])
    shake(backbone, scale=0.1)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = backbone(input_ids=ids).last_hidden_state
        lora.merge(backbone, "shared")
        torch.testing.assert_close(backbone(input_ids=ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def run(folder: Path, **strategies: Any) -> Recorder:
    recorder = Recorder()
    experiment = make_experiment(
        folder, {**strategies, "recorder": recorder}, stream=TinyStream(noise=1.0), optimizer=SGD,
        trainer={"max_epochs": 4},
    )  # fmt: skip
    LoRA(rank=1, alpha=2.0, dropout=0.0, targets="all").apply(experiment.learner.backbone, experiment.stream.info.input)
    experiment.run()
    return recorder


def test_a_loop_that_merges_by_hand(tmp_path: Path) -> None:
    recorder = run(tmp_path, merge=from_page("merge"))
    weight = recorder.before[0][LAYER + "base_layer.weight"]
    first = weight.clone()
    for state, batches, after in zip(recorder.before, recorder.batches, recorder.after, strict=True):
        a, b, head, bias = (
            nn.Parameter(state[name].clone())
            for name in (
                LAYER + "lora_A.shared.weight",
                LAYER + "lora_B.shared.weight",
                "head.linear.weight",
                "head.linear.bias",
            )
        )
        assert not b.any()
        optimizer = SGD([a, b, head, bias])
        for batch in batches:
            x = batch["pixel_values"].flatten(1)
            features = (x @ (weight + 2.0 * b @ a).T + state[LAYER + "base_layer.bias"]).tanh()
            optimizer.zero_grad()
            F.cross_entropy(features @ head.T + bias, batch["labels"]).backward()
            optimizer.step()
        weight = (weight + 2.0 * b @ a).detach()
        torch.testing.assert_close(after[LAYER + "base_layer.weight"], weight, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(weight - first, atol=1e-4) == 3  # one for each experience
    drawn = [state[LAYER + "lora_A.shared.weight"] for state in recorder.before]
    assert len({tuple(a.flatten().tolist()) for a in drawn}) == 3


def test_a_language_model_is_merged_and_learns(tmp_path: Path) -> None:
    made = trained(
        tmp_path, "stream=stdlib_text", "stream.limit=4000", "stream.tokenizer_vocab_size=300", "stream.max_length=32",
        "backbone=transformer_decoder", "backbone.size=16", "backbone.inner_size=16", "tuning=lora", "tuning.targets=all",
        "strategy=[merge,replay]", "optimizer.lr=0.01",
    )  # fmt: skip
    b = [t for n, t in made.learner.state_dict().items() if "lora_B" in n]
    assert b
    assert not any(t.any() for t in b)
    perplexity = made.results.scores["perplexity"]
    assert perplexity[-1][-1] < perplexity[0][-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["strategy=merge"],
            "strategy=merge needs a tuning that can be merged into weights, but tuning=full cannot; choose tuning=lora, dora "
            "or ia3",
        ),
        (
            ["strategy=merge", "tuning=adapter"],
            "strategy=merge needs a tuning that can be merged into weights, but tuning=adapter cannot; choose tuning=lora, "
            "dora or ia3",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(settings: list[str], message: str, capsys: Capture) -> None:
    assert refused(capsys, *settings) == message


@pytest.mark.parametrize(
    "other", ["ewc", "si", "l2_init", "gpm", "ogd", "cls_er", "ema_teacher", "lora_experts", "hat", "ranpac"]
)
def test_what_remembers_parameters_is_refused(other: str) -> None:
    pair = f"(merge cannot be combined with {other}|{other} cannot be combined with merge)"
    with pytest.raises(ValueError, match=pair):
        Chain({other: from_page(other), "merge": from_page("merge")})
