"""Tuning experts: a plain loop that trains one model per experience, what stays untouched, and every row through its expert."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused
from composed import VIT, configuration, trained
from naive import Recorder
from strategies import from_page
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyStream, make_experiment

from clplatform.data import concat
from clplatform.run import execute
from clplatform.saved import load
from clplatform.strategy.base import Chain
from clplatform.tuning.lora import LoRA
from clplatform.types import MASKED, Batch

Capture = pytest.CaptureFixture[str]
SGD = partial(torch.optim.SGD, lr=0.1)
SCALE = 16 / 2  # α/r
OWN = "extras.tuning_experts."
ROWS = OWN + "experts.head.linear.weight"
DIGITS = ["stream.n_experiences=5", "strategy=tuning_experts"]


def run(folder: Path, scenario: str = "class_incremental") -> tuple[Any, Any, Recorder]:
    recorder, stream = Recorder(), TinyStream(scenario=scenario, noise=1.0)
    experiment = make_experiment(
        folder, {"tuning_experts": from_page("tuning_experts"), "recorder": recorder}, stream=stream, optimizer=SGD,
        trainer={"max_epochs": 4},
    )  # fmt: skip
    LoRA(rank=2, alpha=16.0, dropout=0.0, targets="all").apply(experiment.learner.backbone, stream.info.input)
    experiment.run()
    return experiment.learner.eval(), stream, recorder


def by_hand(state: dict[str, Tensor], x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """tanh((W + α/r · B A) x + b)."""
    weight = state["backbone.layer.base_layer.weight"] + SCALE * b @ a
    return (x.flatten(1) @ weight.T + state["backbone.layer.base_layer.bias"]).tanh()


def adapter(rows: Tensor, like: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of a row of values."""
    a, b = (like[f"backbone.layer.lora_{part}.shared.weight"] for part in "AB")
    first, second = rows.split([a.numel(), b.numel()])
    return first.view_as(a), second.view_as(b)


def test_each_expert_is_a_model_that_was_trained_on_its_experience_alone(tmp_path: Path) -> None:
    learner, _, recorder = run(tmp_path)
    final = recorder.after[-1] | {n: t for n, t in learner.state_dict().items() if n.startswith(OWN)}
    values = final[OWN + "values.rows"]
    assert len(values) == 1 + 3
    start = recorder.before[0]
    for name, row in zip("AB", adapter(values[0], start), strict=True):
        assert torch.equal(row, start[f"backbone.layer.lora_{name}.shared.weight"])
    for i, batches in enumerate(recorder.batches):
        state = recorder.before[i]
        a, b = (nn.Parameter(t.clone()) for t in adapter(values[0], start))
        weight, bias = (nn.Parameter(state[ROWS.replace("weight", p)][2 * i :].clone()) for p in ("weight", "bias"))
        optimizer = SGD([a, b, weight, bias])
        for batch in batches:
            loss = F.cross_entropy(
                by_hand(state, batch["pixel_values"], a, b) @ weight.T + bias, batch["labels"] - 2 * i
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for found, expected in zip(adapter(values[1 + i], start), (a, b), strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(final[ROWS][2 * i : 2 * i + 2], weight.detach(), rtol=1e-4, atol=1e-6)


def test_what_is_frozen_stays_so_to_the_bit(tmp_path: Path) -> None:
    learner, _, recorder = run(tmp_path)
    for state in (*recorder.before, *recorder.after):
        for name in ("backbone.layer.base_layer.weight", "backbone.layer.base_layer.bias", "head.linear.weight"):
            n = len(recorder.before[0][name])
            assert torch.equal(state[name][:n], recorder.before[0][name])
    rows = [state[ROWS] for state in recorder.after]
    assert torch.equal(rows[0], rows[2][:2])
    assert torch.equal(rows[1], rows[2][:4])
    values = learner.state_dict()[OWN + "values.rows"]
    assert len({tuple(row.tolist()) for row in values}) == 4


def mixed(stream: Any) -> Batch:
    """Test samples of all experiences in one batch, shuffled."""
    batch = concat([e.test.fetch(torch.arange(len(e.test))) for e in stream])
    order = torch.randperm(len(batch["labels"]), generator=torch.Generator().manual_seed(0))
    return {name: column[order] for name, column in batch.items()}


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
@torch.no_grad()
def test_every_row_goes_through_its_expert(scenario: str, tmp_path: Path) -> None:
    """By task id where it is known, else by the nearest class mean of the features as the tuning begins."""
    with torch.enable_grad():
        learner, stream, _ = run(tmp_path, scenario)
    state, batch = {n: t.clone() for n, t in learner.state_dict().items()}, mixed(stream)
    values = state[OWN + "values.rows"]
    if scenario == "task_incremental":
        expert = batch["task_labels"]
    else:
        means = []
        for experience in stream:
            own = experience.train.fetch(torch.arange(len(experience.train)))
            features = F.normalize(by_hand(state, own["pixel_values"], *adapter(values[0], state)), dim=1)
            means += [features[own["labels"] == k].mean(0) for k in experience.classes]
        bare = by_hand(state, batch["pixel_values"], *adapter(values[0], state))
        expert = torch.stack([F.cosine_similarity(bare, m[None]) for m in means], 1).argmax(1) // 2
    assert len(expert.unique()) == 3
    logits = learner(batch).logits
    assert all(torch.equal(t, state[n]) for n, t in learner.state_dict().items())  # it is as it was
    for i, e in enumerate(expert.tolist()):
        features = by_hand(state, batch["pixel_values"][i : i + 1], *adapter(values[1 + e], state))
        expected = (
            features @ state[ROWS][2 * e : 2 * e + 2].T + state[ROWS.replace("weight", "bias")][2 * e : 2 * e + 2]
        )
        classes = list(stream[e].classes)
        torch.testing.assert_close(logits[i : i + 1, classes], expected, rtol=1e-4, atol=1e-5)
        others = [k for k in range(logits.shape[1]) if k not in classes]
        assert (logits[i, others] == MASKED).all()


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "adapter", "prefix", "prompt", "p_tuning", "bitfit"])
def test_every_tuning_can_be_one_per_experience(name: str, tmp_path: Path) -> None:
    made = trained(tmp_path, *DIGITS, "stream.n_experiences=2", "stream.scenario=task_incremental", f"tuning={name}")
    values = made.learner.state_dict()[OWN + "values.rows"]
    record = made.results.cost["extra_parameters"]
    assert values.shape[0] == 3
    assert all(not torch.equal(values[0], row) for row in values[1:])
    assert record == values.numel() + 2 * 5 * (2 * made.learner.backbone.feature_size + 1)
    batch = made.stream[0].test.fetch(torch.arange(8))
    with torch.inference_mode():
        expected = made.learner(batch).logits
    predictor = load(tmp_path)
    assert torch.equal(predictor.logits(batch["pixel_values"].numpy(), task=0), expected)


def test_what_is_written_goes_through_the_task_s_expert(tmp_path: Path) -> None:
    made = trained(
        tmp_path, "stream=stdlib_text", "stream.limit=4000", "stream.tokenizer_vocab_size=300", "stream.max_length=32",
        "backbone=transformer_decoder", "backbone.size=16", "backbone.inner_size=16", "tuning=lora", "tuning.targets=all",
        "strategy=tuning_experts", "stream.scenario=task_incremental", "optimizer.lr=0.05",
    )  # fmt: skip
    learner, strategy = made.learner, made.learner.chain.strategies["tuning_experts"]
    batch: Batch = made.stream[0].test.fetch(torch.arange(2))
    prompts = {n: batch[n][:, :8] for n in ("input_ids", "attention_mask")} | {"task_labels": torch.tensor([0, 2])}
    written = learner.generate(prompts)
    for i, task in enumerate((0, 2)):
        with strategy.acting(learner, task):  # type: ignore[attr-defined]
            alone = learner.backbone.generate({n: column[i : i + 1] for n, column in prompts.items()})
        assert torch.equal(written[i : i + 1, : alone.shape[1]], alone)


def test_it_needs_a_tuning_and_a_stream_that_tells_where_texts_belong(capsys: Capture) -> None:
    assert refused(capsys, "strategy=tuning_experts") == (
        "strategy=tuning_experts needs a tuning, but tuning=full trains all of the backbone; choose another, such as "
        "tuning=lora"
    )
    said = refused(
        capsys, "strategy=tuning_experts", "tuning=lora", "stream=stdlib_text", "backbone=transformer_decoder"
    )
    assert said == (
        "strategy=tuning_experts chooses the expert of a text by its task: give stream.scenario=task_incremental"
    )


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("tuning_experts", ["tuning=lora", "tuning.targets=all"]),
        ("lora_experts", ["strategy.lora_experts.first=adapter"]),
        ("adapters", ["strategy.adapters.first=adapter"]),
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_expert_that_is_being_trained_answers_for_its_experience(
    name: str, precision: str, extra: list[str], tmp_path: Path
) -> None:
    """Also before the experience ends: what is evaluated during training is not the earlier experts' zero."""
    settings = configuration(
        "stream.n_experiences=2", f"strategy={name}", *extra, *VIT, "evaluate_every=15", "evaluate_samples=60",
        "trainer.limit_train_batches=40", "optimizer.lr=0.01", f"trainer.precision={precision}",
    )  # fmt: skip
    execute(settings, tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "continual_evaluation.jsonl").read_text().splitlines()]
    own = [row["scores"][1] for row in rows if row["experience"] == 1 and not row["end"]]
    assert own
    assert max(own) > 0.1


@pytest.mark.parametrize(
    "other", ["replay", "ewc", "lwf", "joint", "gpm", "packnet", "o_lora", "lora_experts", "avalanche"]
)
def test_is_combined_with_nothing_that_needs_one_model(other: str) -> None:
    pair = f"(tuning_experts cannot be combined with {other}|{other} cannot be combined with tuning_experts) .*: [a-z]+"
    with pytest.raises(ValueError, match=pair):
        Chain({other: from_page(other), "tuning_experts": from_page("tuning_experts")})
