"""Features of frozen backbones are kept between evaluations: the same answers from fewer passes, and never stale ones."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted import livelier
from strategies import from_page
from world import TinyBackbone, TinyStream, make_experiment, tiny_vit

from clplatform.evaluate import evaluate_row, predict
from clplatform.learner import Learner

# Strategy, changes of its page, and what share of the passes of an evaluation the backbone is left to make at most.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ncm": ("ncm", {}),
    "slda": ("slda", {}),
    "ranpac": ("ranpac", {"first_session": False}),
    "ranpac_session": ("ranpac", {"first_session": True}),
    "linear_probe": ("linear_probe", {}),
    "seq_star": ("seq_star", {"warm_up": 1}),
    "l2p": ("l2p", {}),
    "dualprompt": ("dualprompt", {"g_layers": [1], "e_layers": [2]}),
    "coda_prompt": ("coda_prompt", {"layers": [1]}),
    "lora_full": ("lora_experts", {"first": "full"}),
    "lora_adapter": ("lora_experts", {"first": "adapter"}),
    "adapters": ("adapters", {"first": "full"}),
}


def experiment_of(folder: Path, case: str, **options: Any) -> Any:
    name, changes = CASES[case]
    options = {"stream": TinyStream(), "backbone": livelier(tiny_vit()), **options}
    experiment = make_experiment(folder, {name: from_page(name, **changes)}, **options)
    learner: Any = experiment.learner
    learner.passes = 0

    def count(*_: Any) -> None:
        learner.passes += not learner.training

    learner.backbone.register_forward_hook(count)
    return experiment


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_without_it(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in every cell, with evaluations in the middle of experiences too: with fewer passes."""

    kept, within = watched(experiment_of(tmp_path / "kept", case))
    without(monkeypatch)
    plain, expected = watched(experiment_of(tmp_path / "plain", case))
    assert within == expected
    assert kept.results.matrix == plain.results.matrix
    assert kept.learner.passes < plain.learner.passes


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept."""
    monkeypatch.setattr(Learner, "frozen_features", lambda self, batch: self.backbone(batch))
    monkeypatch.setattr(Learner, "with_frozen_features", lambda self, batch, run: batch)


def watched(experiment: Any) -> tuple[Any, list[Any]]:
    """A finished run, and its rows in the middle of epochs."""
    learner, within = experiment.learner, []

    def look(trainer: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            within.append(evaluate_row(learner, experiment.stream, "test", 5))

    learner.after_batch = look
    experiment.run()
    return experiment, within


@pytest.mark.parametrize(
    "names",
    [("l2p", "ranpac"), ("ranpac", "l2p"), ("cls_er", "seq_star"), ("seq_star", "cls_er"), ("o_lora", "ranpac"),
     ("ranpac", "o_lora"), ("cls_er", "linear_probe")],
    ids="+".join,
)  # fmt: skip
def test_nobody_s_features_are_overwritten(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's, or those of an average in the model's place."""
    changes: dict[str, dict[str, Any]] = {
        "ranpac": {"first_session": "l2p" in names},
        "seq_star": {"warm_up": 1},
        "cls_er": {"capacity": 20},
    }

    def experiment(folder: Path) -> Any:
        strategies = {name: from_page(name, **changes.get(name, {})) for name in names}
        return make_experiment(folder, strategies, stream=TinyStream(noise=1.5), backbone=livelier(tiny_vit()))

    kept, within = watched(experiment(tmp_path / "kept"))
    batch = {
        n: torch.cat([e.test.fetch(torch.arange(8))[n] for e in kept.stream])
        for n in ("pixel_values", "labels", "task_labels", "index")
    }
    with torch.no_grad():
        logits = kept.learner.eval()(batch).logits
    without(monkeypatch)
    plain, expected = watched(experiment(tmp_path / "plain"))
    assert within == expected
    assert kept.results.matrix == plain.results.matrix
    with torch.no_grad():
        torch.testing.assert_close(logits, plain.learner.eval()(batch).logits)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("case", ["linear_probe", "l2p", "ncm"])
def test_features_have_the_precision_that_the_model_has_now(case: str, precision: str, tmp_path: Path) -> None:
    """Lightning converts it when it is first trained, after the first evaluation."""
    experiment_of(tmp_path, case, trainer={"max_epochs": 1, "precision": precision}).run()


def test_what_goes_on_in_a_frozen_backbone_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of batch normalisation."""
    results = []
    for folder in ("kept", "plain"):
        experiment = experiment_of(tmp_path / folder, "lora_full", backbone=TinyBackbone(norm=True))
        experiment.run()
        results.append(experiment.results.matrix)
        without(monkeypatch)
    assert results[0] == results[1]


def test_each_sample_passes_once(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "ncm")
    experiment.run()
    learner, data = experiment.learner, experiment.stream[0].test
    learner.passes = 0
    first = predict(learner, data, 7)
    assert learner.passes == -(-len(data) // 7)  # batches of another size than the run's
    assert torch.equal(predict(learner, data, 7), first)
    assert learner.passes == -(-len(data) // 7)
    learner.eval()(data.fetch(torch.arange(3)))  # outside an evaluation nothing is known
    assert learner.passes == -(-len(data) // 7) + 1
    for batch in learner.evaluation_batches(data, 7):  # a strategy that asks for some rows of a batch gets those
        some = {name: column[::2] for name, column in batch.items()}
        torch.testing.assert_close(learner.frozen_features(some), learner.frozen_features(batch)[::2])


def test_what_is_known_goes_with_the_data(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "ncm")
    experiment.run()
    learner, known = experiment.learner, experiment.learner._kept.known
    n = len(known)
    for _ in range(3):  # data of the moment, as those of a service
        predict(learner, experiment.stream[0].test.select(torch.arange(4)), 2)
    gc.collect()
    assert len(known) == n > 0
