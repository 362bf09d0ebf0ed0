"""Language models learn, forget, are scored, generate and resume like classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clplatform.data import ConcatData, Loader, TensorData, concat, lengths, predicted, trim
from clplatform.evaluate import decode, evaluate_row, language_model, write
from clplatform.experiment import Experiment
from clplatform.learner import Learner
from clplatform.regularization.fisher import fisher_diagonal
from clplatform.types import IGNORED, ClplatformError
from tests.language_world import VOCABULARY, make_language_experiment, tiny_backbone, tiny_stream
from tests.strategies import NAMES, from_page, needs_tuning
from tests.world import same, weights

LANGUAGE = ("causal_lm", "masked_lm", "seq2seq")
CHANGES: dict[str, dict[str, Any]] = {"ewc": {"fisher": "empirical"}, "a_gem": {"policy": "reservoir"}}
GENERAL = [name for name in NAMES if from_page(name, **CHANGES.get(name, {})).problems >= {*LANGUAGE}]


def made(name: str) -> dict[str, Any]:
    return {name: from_page(name, **CHANGES.get(name, {}))}


def ids_needed(name: str) -> bool:
    return "task_ids" in from_page(name, **CHANGES.get(name, {})).needs or name in ("lora_experts", "tuning_experts")


# -- the loop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", LANGUAGE)
def test_a_language_model_learns_each_domain_and_forgets_the_others(problem: str, tmp_path: Path) -> None:
    experiment = make_language_experiment(tmp_path, problem, made("finetuning"), epochs=25, lr=0.02)
    results = experiment.run()
    assert [len(row) for row in results.matrix] == [3] * 4
    assert all(value is not None for row in results.matrix for value in row)  # the vocabulary is there from the start
    forgetting, learned = results.metrics["average_forgetting"], results.metrics["learning_accuracy"]
    assert forgetting is not None and learned is not None
    if problem == "seq2seq":
        first = results.matrix[1][0]
        assert first is not None and first > 0.5 and forgetting > 0.2
        assert set(results.scores) == {"chrf", "nats_per_token"}
    else:
        assert learned < 10 and forgetting > 1  # untrained: about 40
        assert "nats_per_token" in results.scores
        nats = results.scores["nats_per_token"]
        assert all(math.exp(n) == pytest.approx(p) for a, b in zip(nats, results.matrix, strict=True)
                   for n, p in zip(a, b, strict=True) if n is not None)  # fmt: skip
    assert results.confusion is None
    again = type(results).load(tmp_path)
    assert again.scores == results.scores and again.samples == results.samples


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, "causal_lm") for name in GENERAL),
        *((name, "seq2seq") for name in ("replay", "lwf", "lora_experts", "independent", "mir")),
        *((name, "masked_lm") for name in ("ewc", "ema_teacher", "replay")),
    ],
)
def test_a_general_strategy_runs_and_resumes_to_the_bit(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_needed(name)
    whole = make_language_experiment(tmp_path / "whole", problem, made(name), task_ids=ids, dropout=0.1, epochs=1)
    whole.run()
    half = make_language_experiment(tmp_path / "half", problem, made(name), task_ids=ids, dropout=0.1, epochs=1)
    learn = Experiment._learn

    def stop(self: Experiment, experience: Any, *, resume: bool) -> None:
        if experience.index == 2:
            raise KeyboardInterrupt
        learn(self, experience, resume=resume)

    monkeypatch.setattr(Experiment, "_learn", stop)
    with pytest.raises(KeyboardInterrupt):
        half.run()
    monkeypatch.setattr(Experiment, "_learn", learn)
    resumed = make_language_experiment(tmp_path / "half", problem, made(name), task_ids=ids, dropout=0.1, epochs=1)
    resumed.results = type(resumed.results).load(tmp_path / "half")
    resumed.run(resume=True)
    assert same(weights(whole.learner), weights(resumed.learner))
    assert resumed.results.matrix == whole.results.matrix and resumed.results.scores == whole.results.scores
    assert resumed.results.samples == whole.results.samples


@pytest.fixture(scope="module")
def learned_plainly(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Any]:
    """Weights of fine-tuning, with task ids or without."""

    @cache
    def learned(ids: bool) -> Any:
        folder = tmp_path_factory.mktemp("plain")
        experiment = make_language_experiment(folder, "causal_lm", made("finetuning"), task_ids=ids)
        experiment.run()
        return weights(experiment.learner)

    return learned


# Beside fine-tuning of all weights: see the tests of those that need a tuning.
@pytest.mark.parametrize(
    "name",
    [n for n in GENERAL if n not in ("finetuning", "joint", "cumulative", "independent") and not needs_tuning(n)],
)
def test_a_general_strategy_changes_what_is_learned(
    name: str, learned_plainly: Callable[[bool], Any], tmp_path: Path
) -> None:
    own = make_language_experiment(tmp_path, "causal_lm", made(name), task_ids=ids_needed(name))
    own.run()
    a, b = learned_plainly(ids_needed(name)), weights(own.learner)
    assert any(not torch.equal(a[n], b[n]) for n in a if n in b)


def test_replay_forgets_less(tmp_path: Path) -> None:
    problem = "causal_lm"
    plain = make_language_experiment(tmp_path / "plain", problem, made("finetuning"), epochs=15).run()
    replay = make_language_experiment(
        tmp_path / "replay", problem, {"replay": from_page("replay", capacity=32, batch_size=None)}, epochs=15
    ).run()
    a, b = plain.metrics["average_forgetting"], replay.metrics["average_forgetting"]
    assert a is not None and b is not None and b < a / 2


# -- losses and scores against what they say --------------------------------------------------------------------------------


@pytest.fixture
def causal() -> tuple[Learner, Any]:
    stream = tiny_stream("causal_lm")
    experiment = make_language_experiment(Path("unused"), "causal_lm", made("finetuning"), stream=stream)
    experiment.learner.build(stream[0].info)
    return experiment.learner.eval(), stream


def test_the_loss_is_the_mean_over_tokens_and_the_sum_over_a_samples_own(causal: tuple[Learner, Any]) -> None:
    learner, stream = causal
    batch = stream[0].train.fetch(torch.arange(8))
    output = learner(batch)
    each = [
        F.cross_entropy(output.logits[b][batch["labels"][b] != IGNORED], row[row != IGNORED], reduction="sum")
        for b, row in enumerate(batch["labels"])
    ]
    assert torch.allclose(learner.task_loss(batch, output, "none"), torch.stack(each), atol=1e-5)
    n = int((batch["labels"] != IGNORED).sum())
    assert learner.task_loss(batch, output).detach().item() == pytest.approx(
        float(torch.stack(each).sum().detach()) / n, rel=1e-5
    )
    assert predicted(batch, output.logits).shape == (n, VOCABULARY)


def test_perplexity_and_bits_per_byte_are_those_of_the_whole_text(causal: tuple[Learner, Any]) -> None:
    learner, stream = causal
    data = stream[0].test
    batch = data.fetch(torch.arange(len(data)))
    log_p = learner(batch).logits.log_softmax(-1)
    mask = batch["labels"] != IGNORED
    nats = -log_p.gather(2, batch["labels"].clamp_min(0)[:, :, None])[:, :, 0][mask].double().sum().item()
    for batch_size in (3, 100):
        scores = language_model(learner, stream, data, batch_size)
        assert scores["perplexity"] == pytest.approx(math.exp(nats / int(mask.sum())), rel=1e-5)
        assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / int(batch["n_bytes"].sum()), rel=1e-5)


def test_padding_changes_no_score(causal: tuple[Learner, Any]) -> None:
    learner, stream = causal
    data = stream[0].test
    wider = {
        name: F.pad(c, (0, 2), value=IGNORED if name == "labels" else 0) if c.ndim == 2 else c
        for name, c in data.columns.items()
    }
    a, b = (language_model(learner, stream, d, 5) for d in (data, TensorData(wider)))
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-6)


def test_what_is_written_belongs_to_its_source(tmp_path: Path) -> None:
    stream = tiny_stream("seq2seq", n=1)
    experiment = make_language_experiment(tmp_path, "seq2seq", made("finetuning"), stream=stream, epochs=30, lr=0.02)
    experiment.run()
    last = stream[0].test
    rows = write(experiment.learner, stream, last, 5)
    assert [row[:2] for row in rows] == [stream.texts[i] for i in last.columns["index"].tolist()]
    alone = [last.fetch(torch.tensor([i])) for i in range(len(rows))]
    written = [decode(stream.tokenizer, experiment.learner.generate(batch))[0] for batch in alone]
    assert written == [row[2] for row in rows] and len(set(written)) > len(rows) // 2  # another order would be seen


@pytest.mark.parametrize("kind", ["empirical", "sampled"])
def test_the_fisher_information_of_texts_is_that_of_their_whole_probability(
    kind: Any, causal: tuple[Learner, Any]
) -> None:
    learner, stream = causal
    data = stream[0].train.select(torch.arange(6))
    found = fisher_diagonal(learner, data, "empirical")
    named = {n: p for n, p in learner.named_parameters() if n in found}
    expected = {n: torch.zeros_like(p) for n, p in named.items()}
    for i in range(6):
        batch = data.fetch(torch.tensor([i]))
        loss = learner.task_loss(batch, learner(batch), "sum")
        for n, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            expected[n] += g**2 / 6
    for n in named:
        assert torch.allclose(found[n], expected[n], rtol=1e-3, atol=1e-6), n
    drawn = fisher_diagonal(learner, data, kind)
    assert all(torch.isfinite(f).all() for f in drawn.values()) and any(f.any() for f in drawn.values())


# -- what cannot be is refused ------------------------------------------------------------------------------------------------


def test_ewc_does_not_sum_over_a_vocabulary() -> None:
    with pytest.raises(ClplatformError, match=r"strategy\.ewc\.fisher=exact sums over all tokens"):
        from_page("ewc", fisher="exact").check(tiny_stream("causal_lm").info)


@pytest.mark.parametrize("name", ["replay", "a_gem"])
def test_a_memory_cannot_balance_classes_that_are_not_there(name: str) -> None:
    with pytest.raises(ClplatformError, match=rf"strategy\.{name}\.policy balances classes"):
        from_page(name, policy="class_balanced").check(tiny_stream("causal_lm").info)


def test_experts_of_texts_need_task_ids() -> None:
    with pytest.raises(ClplatformError, match="task_incremental"):
        from_page("lora_experts").check(tiny_stream("causal_lm").info)
    from_page("lora_experts").check(tiny_stream("causal_lm", task_ids=True).info)


def test_what_a_task_needs_has_no_meaning_before_it(tmp_path: Path) -> None:
    experiment = make_language_experiment(tmp_path, "causal_lm", made("finetuning"), task_ids=True)
    experiment.learner.build(experiment.stream[0].info)
    row = evaluate_row(experiment.learner, experiment.stream, "test", 16)
    assert [scores is None for scores in row] == [False, True, True]


# -- batches of texts -----------------------------------------------------------------------------------------------------------


def test_what_is_read_and_what_is_written_are_cut_to_their_own_lengths() -> None:
    batch = {
        "input_ids": torch.ones(2, 6), "attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]),
        "decoder_input_ids": torch.ones(2, 6), "decoder_attention_mask": torch.tensor([[1] * 4 + [0] * 2, [1] + [0] * 5]),
        "labels": torch.full((2, 6), 5), "index": torch.arange(2),
    }  # fmt: skip
    cut = trim(batch)
    assert {n: tuple(v.shape) for n, v in cut.items()} == {
        "input_ids": (2, 2), "attention_mask": (2, 2), "decoder_input_ids": (2, 4), "decoder_attention_mask": (2, 4),
        "labels": (2, 4), "index": (2,),
    }  # fmt: skip


def test_batches_of_several_widths_become_one_without_a_new_label() -> None:
    a, b = ({"labels": torch.full((1, t), 5), "decoder_input_ids": torch.ones(1, t)} for t in (2, 3))
    both = concat([a, b])
    assert both["labels"].tolist() == [[5, 5, IGNORED], [5, 5, 5]]
    assert both["decoder_input_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_buckets_hold_every_sample_once_and_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 1003
    sizes = torch.randint(1, 40, (n,), generator=generator)
    mask = (torch.arange(40) < sizes[:, None]).long()
    columns = {
        "input_ids": mask,
        "attention_mask": mask,
        "labels": torch.zeros(n),
        "task_labels": torch.zeros(n),
        "index": torch.arange(n),
    }
    data = TensorData(columns)
    plain, bucketed = (Loader(data, 16, shuffle=True, seed=1, bucket=bucket) for bucket in (False, True))

    def padding(loader: Loader) -> tuple[list[int], int]:
        batches = list(loader)
        assert [len(b["index"]) for b in batches] == [16] * 62 + [11]
        return torch.cat([b["index"] for b in batches]).tolist(), sum(
            int((b["attention_mask"] == 0).sum()) for b in batches
        )

    order, wasted = padding(bucketed)
    assert sorted(order) == list(range(n))
    assert wasted < padding(plain)[1] / 5
    assert padding(bucketed)[0] != order  # another order in the next epoch
    assert torch.equal(bucketed.order(0), Loader(data, 16, shuffle=True, seed=1, bucket=True).order(0))
    means = [float(sizes[rows].float().mean()) for rows in bucketed.order(0).split(16)]
    assert means != sorted(means)  # short and long batches in turn
    both = lengths(ConcatData([data, data.select(torch.arange(5))]))
    assert both is not None and both.tolist() == [*sizes.tolist(), *sizes[:5].tolist()]


def test_a_language_model_has_no_head_of_its_own() -> None:
    experiment = make_language_experiment(Path("unused"), "causal_lm", made("finetuning"))
    assert list(experiment.learner.head.parameters()) == []
    assert (
        experiment.learner.backbone.projection.weight
        is experiment.learner.backbone.model.decoder.embeddings.token.weight
    )
    assert tiny_backbone("masked_lm").projection.bias is not None
