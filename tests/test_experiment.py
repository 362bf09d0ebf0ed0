"""The loop: what it measures, that it repeats to the bit, and that nothing measured changes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from world import TinyStream, make_experiment, same, weights

from clplatform.results import Results
from clplatform.strategy.base import Strategy
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import Stage


def finetuning() -> dict[str, Strategy]:
    return {"finetuning": Finetuning()}


def test_class_incremental_matrix_has_no_meaningless_entries(tmp_path: Path) -> None:
    results = make_experiment(tmp_path, finetuning()).run()
    known = [[value is not None for value in row] for row in results.matrix]
    assert known == [[True, False, False], [True, False, False], [True, True, False], [True, True, True]]
    assert results.matrix[1][0] > 0.9  # type: ignore[operator]
    assert results.matrix[3][0] < 0.5  # type: ignore[operator]  # it forgets
    assert results.status == "completed"


def test_domain_incremental_matrix_is_full(tmp_path: Path) -> None:
    stream = TinyStream(scenario="domain_incremental")
    results = make_experiment(tmp_path, finetuning(), stream=stream).run()
    assert all(value is not None for row in results.matrix for value in row)
    assert results.metrics["forward_transfer"] is not None


def test_task_incremental_hides_other_tasks_classes(tmp_path: Path) -> None:
    stream = TinyStream(scenario="task_incremental")
    experiment = make_experiment(tmp_path, finetuning(), stream=stream)
    results = experiment.run()
    batch = stream[0].test.fetch(torch.arange(4))
    assert set(experiment.learner.eval()(batch).logits.argmax(1).tolist()) <= {0, 1}
    assert results.matrix[3][0] > 0.5  # type: ignore[operator]  # among two classes only
    assert results.matrix[1][1] is None


def test_accuracy_is_the_share_of_samples(tmp_path: Path) -> None:
    stream = TinyStream(noise=2.5)
    experiment = make_experiment(tmp_path, finetuning(), stream=stream)
    results = experiment.run()
    batch = stream[2].test.fetch(torch.arange(len(stream[2].test)))
    with torch.no_grad():
        right = (experiment.learner.eval()(batch).logits.argmax(1) == batch["labels"]).float().mean().item()
    assert results.matrix[3][2] == pytest.approx(right)
    assert results.confusion is not None
    assert sum(map(sum, results.confusion)) == sum(len(e.test) for e in stream)
    diagonal = sum(results.confusion[k][k] for k in range(6))
    assert diagonal / 48 == pytest.approx(sum(results.matrix[3]) / 3)  # type: ignore[arg-type]


def test_same_seed_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    runs = [
        make_experiment(tmp_path / str(i), finetuning(), seed=seed, dropout=0.2) for i, seed in enumerate((0, 0, 1))
    ]
    matrices = [run.run().matrix for run in runs]
    assert matrices[0] == matrices[1]
    assert same(weights(runs[0].learner), weights(runs[1].learner))
    assert not same(weights(runs[0].learner), weights(runs[2].learner))


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Random numbers drawn by whoever watches do not reach the training."""

    class Noisy:
        def start_experience(self, *args: object) -> None:
            torch.rand(17)

        def finish_experience(self, *args: object) -> None:
            torch.rand(5)

    quiet, watched = (make_experiment(tmp_path / n, finetuning(), dropout=0.2) for n in ("a", "b"))
    watched.observers = [Noisy()]
    assert quiet.run().matrix == watched.run().matrix
    assert same(weights(quiet.learner), weights(watched.learner))


def test_every_experience_trains(tmp_path: Path) -> None:
    """A reused Trainer would train nothing from the second experience on."""
    experiment = make_experiment(tmp_path, finetuning())
    results = experiment.run()
    assert results.cost["steps"] == 3 * 2 * 4  # experiences × epochs × batches
    assert results.cost["samples"] == 3 * 2 * 32
    assert all(results.matrix[i + 1][i] > 0.8 for i in range(3))  # type: ignore[operator]


def test_stages_run_in_order_with_their_own_length_and_parameters(tmp_path: Path) -> None:
    seen: list[tuple[str, int, list[str]]] = []

    class TwoStages(Strategy):
        def stages(self, learner, experience):
            return [Stage("head", max_epochs=1, trainable="head"), Stage("all", max_epochs=3)]

        def after_stage(self, learner, experience, stage):
            seen.append((stage.name, learner.steps, []))

        def after_step(self, learner):
            if learner.stage.name == "head":
                seen.append(("step", 0, [n for n, p in learner.named_parameters() if p.grad is not None]))

    make_experiment(tmp_path, {"two": TwoStages()}, stream=TinyStream(1)).run()
    assert [(name, steps) for name, steps, _ in seen if name != "step"] == [("head", 4), ("all", 16)]
    assert all(names == ["head.linear.weight", "head.linear.bias"] for name, _, names in seen if name == "step")


def test_a_strategy_without_stages_trains_nothing(tmp_path: Path) -> None:
    class Nothing(Strategy):
        def stages(self, learner, experience):
            return []

    assert make_experiment(tmp_path, {"nothing": Nothing()}).run().cost["steps"] == 0


def test_files_it_leaves(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, finetuning())
    results = experiment.run()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["matrix"] == results.matrix
    assert written["metrics"] == results.metrics
    assert written["schema_version"] == 1
    rows = (tmp_path / "accuracy_matrix.csv").read_text().splitlines()
    assert rows[0] == "after,e1,e2,e3"
    assert [float(v) for v in rows[-1].split(",")[1:]] == results.matrix[-1]
    assert rows[1].split(",")[2:] == ["", ""]
    assert Results.load(tmp_path) == results
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    experiment = make_experiment(
        tmp_path, finetuning(), stream=TinyStream(1), trainer={"max_epochs": 30}, fitter={"patience": 2}
    )
    results = experiment.run()
    assert results.cost["steps"] < 30 * 4
    assert results.validation_matrix[1][0] == 1.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_and_accumulation_reach_the_optimizer(tmp_path: Path, accumulate: int) -> None:
    trainer = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1e-9}
    experiment = make_experiment(tmp_path, finetuning(), stream=TinyStream(1), trainer=trainer)
    experiment.learner.build(experiment.stream[0].info)
    experiment.run()
    assert experiment.learner.steps == 8 // accumulate


def test_mixed_precision_runs_and_evaluates_alike(tmp_path: Path) -> None:
    results = make_experiment(tmp_path, finetuning(), trainer={"precision": "bf16-mixed"}).run()
    assert results.matrix[1][0] > 0.9  # type: ignore[operator]


def test_weight_decay_spares_biases_and_norms(tmp_path: Path) -> None:
    learner = make_experiment(tmp_path, finetuning()).learner
    learner.build(TinyStream()[0].info)
    decayed, plain = learner.parameter_groups()
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert plain["weight_decay"] == 0.0
    assert "weight_decay" not in decayed


def test_an_error_is_recorded_by_the_runner_and_kept_results_stay(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, finetuning())

    def fail(*args: object) -> None:
        if experiment.learner.position[0] == 1:
            raise RuntimeError("boom")

    experiment.fitter.after_batch = fail
    with pytest.raises(RuntimeError, match="boom"):
        experiment.run()
    assert len(Results.load(tmp_path).matrix) == 2


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 8),
        ({"accumulate_grad_batches": 3}, 4),
        ({"max_steps": 5}, 5),
        ({"limit_train_batches": 2}, 4),
        ({"limit_train_batches": 0.5}, 4),
    ],
)
def test_the_schedule_spans_the_steps_that_are_taken(tmp_path: Path, settings: dict[str, Any], steps: int) -> None:
    asked: list[int] = []

    def schedule(optimizer: torch.optim.Optimizer, n_steps: int) -> None:
        asked.append(n_steps)

    experiment = make_experiment(tmp_path, finetuning(), stream=TinyStream(1), trainer=settings, schedule=schedule)
    experiment.run()
    assert asked == [steps]
    assert experiment.learner.steps == steps
