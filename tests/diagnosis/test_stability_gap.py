"""Evaluation every few steps: it measures what an evaluation there would, changes nothing, and goes on with a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, call, only_run
from strategies import STRATEGIES
from world import TinyStream, make_experiment, same, weights

from clplatform import checkpoint
from clplatform.diagnosis.stability_gap import FILE, ContinualEvaluation, rows_of
from clplatform.evaluate import accuracy
from clplatform.experiment import Experiment
from clplatform.files import read_json
from clplatform.results import Results
from clplatform.strategy.base import Strategy
from clplatform.strategy.finetuning import Finetuning


class Killed(Exception):
    pass


class Drawing(Strategy):
    """Draws random numbers whenever the model runs, evaluated or not; the loss depends on them."""

    def forward(self, learner, batch, run):
        torch.rand(1)
        torch.rand(1, generator=learner.generator)
        return run(batch)

    def loss(self, learner, batch, output):
        noise = torch.randn(output.logits.shape, generator=learner.generator) + torch.randn(output.logits.shape)
        return {"noise": (noise * output.logits).mean()}


def watched(
    folder: Path, strategies: dict[str, Strategy], every: int | None, samples: int | None = None, **options: Any
) -> Experiment:
    """The tiny world's experiment, as `run.assemble` puts a continual evaluation into it."""
    experiment = make_experiment(folder, strategies, dropout=0.2, fitter={"checkpoint_every": 3}, **options)
    if (folder / "results.json").exists():
        experiment.results = Results.load(folder)
    if every is not None:
        evaluation = ContinualEvaluation(
            every=every, samples=samples, stream=experiment.stream, results=experiment.results, run_dir=folder,
            batch_size=32,
        )  # fmt: skip
        experiment.observers.append(evaluation)
        experiment.fitter.after_batch = evaluation.after_batch
    return experiment


CASES = {
    "drawing": lambda: {"drawing": Drawing()},
    "replay": STRATEGIES["replay"],
    "mir": STRATEGIES["mir by batch, at the optimizer's rate"],
}


@pytest.mark.parametrize("name", CASES)
def test_it_does_not_change_the_run(name: str, tmp_path: Path) -> None:
    plain = watched(tmp_path / "plain", CASES[name](), None)
    plain.run()
    seen = watched(tmp_path / "seen", CASES[name](), 1)
    seen.run()
    assert len(rows_of(tmp_path / "seen" / FILE)) == plain.results.cost["steps"] + 3
    assert same(weights(plain.learner), weights(seen.learner))
    assert plain.results.matrix == seen.results.matrix
    for count in ("steps", "samples", "flops"):
        assert plain.results.cost[count] == seen.results.cost[count]


def test_the_points_are_evaluations_at_these_steps(tmp_path: Path) -> None:
    experiment = watched(tmp_path, {"finetuning": Finetuning()}, 3)
    evaluate, expected = experiment.fitter.after_batch, {}
    assert evaluate is not None

    def both(trainer: Any, learner: Any, batch_idx: int) -> None:
        evaluate(trainer, learner, batch_idx)
        if learner.steps % 3 == 0:
            seen = [e for e in experiment.stream if e.index <= learner.experience.index]
            expected[learner.steps] = [accuracy(learner, e.test, 32) for e in seen]

    experiment.fitter.after_batch = both
    experiment.run()
    rows = rows_of(tmp_path / FILE)
    assert {row["step"]: row["scores"] for row in rows if not row["end"]} == expected
    assert list(expected) == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [row["experience"] for row in rows if not row["end"]] == [0, 0, 1, 1, 1, 2, 2, 2]
    ends = [row["scores"] for row in rows if row["end"]]
    assert ends == [experiment.results.matrix[i + 1][: i + 1] for i in range(3)]
    recorded = read_json(tmp_path / "results.json")["continual_evaluation"]
    lowest = [min(row["scores"][i] for row in rows if row["experience"] > i) for i in range(2)]
    assert recorded["worst"] == lowest
    assert recorded["min_acc"] == sum(lowest) / 2
    assert recorded["seconds"] > 0


def test_gradients_that_only_accumulate_are_no_step(tmp_path: Path) -> None:
    experiment = watched(tmp_path, {"finetuning": Finetuning()}, 1, trainer={"accumulate_grad_batches": 3})
    experiment.run()
    steps = [row["step"] for row in rows_of(tmp_path / FILE) if not row["end"]]
    assert steps == list(range(1, int(experiment.results.cost["steps"]) + 1))


def test_on_some_samples_only(tmp_path: Path) -> None:
    experiment = watched(tmp_path, {"finetuning": Finetuning()}, 4, samples=5)
    experiment.run()
    values = [v for row in rows_of(tmp_path / FILE) for v in row["scores"]]
    assert {round(5 * v, 4) for v in values} <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


@pytest.mark.parametrize("batch", [2, 10, 15])
def test_a_killed_run_goes_on_to_the_same_curve(batch: int, tmp_path: Path) -> None:
    watched(tmp_path / "whole", STRATEGIES["replay"](), 2).run()
    killed, count = watched(tmp_path / "killed", STRATEGIES["replay"](), 2), 0
    evaluate = killed.fitter.after_batch
    assert evaluate is not None

    def kill(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == batch:
            raise Killed
        evaluate(*arguments)

    killed.fitter.after_batch = kill
    with pytest.raises(Killed):
        killed.run()
    with (tmp_path / "killed" / FILE).open("a") as file:
        file.write('{"step": 99, "experie')  # half a line
    assert batch != 15 or checkpoint.load(tmp_path / "killed" / "checkpoints" / "step.ckpt")
    watched(tmp_path / "killed", STRATEGIES["replay"](), 2).run(resume=True)
    curves = [rows_of(tmp_path / name / FILE) for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    found = [read_json(tmp_path / name / "results.json")["continual_evaluation"] for name in ("whole", "killed")]
    assert {**found[0], "seconds": 0} == {**found[1], "seconds": 0}


def test_a_new_run_does_not_inherit_a_curve(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"step": 999, "experience": 2, "end": True, "scores": [0, 0, 0]}) + "\n")
    watched(tmp_path, {"finetuning": Finetuning()}, 4).run()
    assert max(row["step"] for row in rows_of(tmp_path / FILE)) == 24


def test_domains_and_tasks(tmp_path: Path) -> None:
    for scenario in ("domain_incremental", "task_incremental"):
        watched(tmp_path / scenario, {"finetuning": Finetuning()}, 4, stream=TinyStream(scenario=scenario)).run()
        assert read_json(tmp_path / scenario / "results.json")["continual_evaluation"]["min_acc"] is not None


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, *TINY, "strategy=finetuning", "evaluate_every=1", "evaluate_samples=20", "keep_models=true")
    assert done.code == 0, done.err
    run = only_run()
    assert [row["step"] for row in rows_of(run / FILE)] == [1, 2, 2, 3, 4, 4]
    recorded = read_json(run / "results.json")["continual_evaluation"]
    assert (recorded["every"], recorded["samples"], len(recorded["worst"])) == (1, 20, 1)
    assert sorted(p.name for p in (run / "models").iterdir()) == ["after_1", "after_2"]
    report = (run / "report.md").read_text()
    assert "WC" in report
    assert "While later experiences are learned" in (run / "report.html").read_text()
