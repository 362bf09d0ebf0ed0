"""Features of frozen backbones are kept between evaluations: the same answers from fewer passes, and never stale ones."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted import livelier
from strategies import from_page
from world import TinyStream, make_experiment, tiny_vit

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


def experiment_of(folder: Path, case: str) -> Any:
    name, changes = CASES[case]
    experiment = make_experiment(
        folder, {name: from_page(name, **changes)}, stream=TinyStream(), backbone=livelier(tiny_vit())
    )
    learner: Any = experiment.learner
    learner.passes = 0

    def count(*_: Any) -> None:
        learner.passes += not learner.training

    learner.backbone.register_forward_hook(count)
    return experiment


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_without_it(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in every cell, with evaluations in the middle of experiences too: with fewer passes."""

    def run(folder: Path) -> tuple[Any, list[Any]]:
        experiment = experiment_of(folder, case)
        learner, within = experiment.learner, []

        def look(trainer: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                within.append(evaluate_row(learner, experiment.stream, "test", 5))

        learner.after_batch = look
        experiment.run()
        return experiment, within

    kept, within = run(tmp_path / "kept")
    monkeypatch.setattr(Learner, "frozen_features", lambda self, batch: self.backbone(batch))
    plain, expected = run(tmp_path / "plain")
    assert within == expected
    assert kept.results.matrix == plain.results.matrix
    assert kept.learner.passes < plain.learner.passes


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
    learner, known = experiment.learner, experiment.learner._known
    n = len(known)
    for _ in range(3):  # data of the moment, as those of a service
        predict(learner, experiment.stream[0].test.select(torch.arange(4)), 2)
    gc.collect()
    assert len(known) == n > 0
