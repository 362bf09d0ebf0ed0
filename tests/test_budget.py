"""Equal budgets: an experience takes so many steps, samples, operations or seconds, whatever the strategy does with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import TINY, call, only_run, refused
from strategies import STRATEGIES, scenario_of
from world import TinyStream, make_experiment, make_learner, same, weights

from clplatform.budget import Budget, build_budget
from clplatform.config import identity
from clplatform.experiment import Experiment
from clplatform.results import Results
from clplatform.schedule import schedule
from clplatform.strategy.base import Strategy
from clplatform.types import Stage

LINEAR = partial(schedule, kind="linear", warmup=0.2)
FLOPS = 768.0  # of a sample of the tiny world, forward and backward


class Stages(Strategy):
    """Writes down, for each stage, its steps and the learning rates it saw."""

    def __init__(self, *epochs: int | None) -> None:
        self.epochs, self.seen = epochs, []

    def stages(self, learner: Any, experience: Any) -> list[Stage]:
        return [Stage(str(i), max_epochs=n) for i, n in enumerate(self.epochs)]

    def before_stage(self, learner: Any, experience: Any, stage: Stage) -> None:
        self.seen.append([])

    def after_step(self, learner: Any) -> None:
        self.seen[-1].append(learner.trainer.optimizers[0].param_groups[0]["lr"])


def run(folder: Path, strategies: dict[str, Strategy], budget: Budget, **options: Any) -> Any:
    fitter = {"budget": budget, **options.pop("fitter", {})}
    experiment = make_experiment(folder, strategies, fitter=fitter, **options)
    experiment.run()
    return experiment


# 32 samples in an experience: 4 batches of 8 in an epoch; two epochs without a budget.
@pytest.mark.parametrize("name", ["finetuning", "replay", "packnet", "gdumb", "bic", "joint", "replay+lwf"])
@pytest.mark.parametrize("n", [3, 11])
def test_every_strategy_takes_as_many_steps(name: str, n: int, tmp_path: Path) -> None:
    """Less than the epochs and more; joint sees more data, gdumb less, packnet and bic have two stages."""
    strategies = STRATEGIES[name]()
    stream = TinyStream(scenario=scenario_of(*strategies))
    found = run(tmp_path, strategies, Budget("steps", n), stream=stream)
    assert found.results.budget["used"] == [n] * 3
    assert found.results.cost["steps"] == 3 * n


def test_a_strategy_that_doubles_its_batches_takes_half_the_steps_for_as_many_samples_or_operations(
    tmp_path: Path,
) -> None:
    for unit, value, used in (("samples", 160, 160), ("flops", 160 * FLOPS, 160 * FLOPS)):
        plain = run(tmp_path / f"a{unit}", STRATEGIES["finetuning"](), Budget(unit, value))  # type: ignore[arg-type]
        double = run(tmp_path / f"b{unit}", STRATEGIES["replay"](), Budget(unit, value))  # type: ignore[arg-type]
        for experiment in (plain, double):
            for spent in experiment.results.budget["used"]:
                assert used <= spent < used * (1 + 16 / 160)  # by less than one step
        assert double.results.cost["steps"] <= 0.75 * plain.results.cost["steps"]


def test_operations_are_those_that_the_record_counts(tmp_path: Path) -> None:
    found = run(tmp_path, STRATEGIES["replay"](), Budget("flops", 5e4))
    assert sum(found.results.budget["used"]) == found.results.cost["flops"]  # replay consolidates without the model


def test_seconds_are_those_of_training_steps_alone(tmp_path: Path) -> None:
    import time

    def slow(*_: Any) -> None:  # as a log or an evaluation between two steps is
        time.sleep(0.02)

    found = run(tmp_path, STRATEGIES["finetuning"](), Budget("seconds", 0.1), fitter={"after_batch": slow})
    steps = found.results.cost["steps"]
    assert steps > 12  # five steps would have lasted 0.1 s if the sleep counted
    for used in found.results.budget["used"]:
        assert 0.1 <= used < 0.2


@pytest.mark.parametrize(("epochs", "steps"), [((1, 3), (3, 9)), ((None, 2), (6, 6)), ((2, 0, 1), (8, 0, 4))])
def test_stages_share_by_their_epochs(epochs: tuple[int | None, ...], steps: tuple[int, ...], tmp_path: Path) -> None:
    strategy = Stages(*epochs)
    run(tmp_path, {"s": strategy}, Budget("steps", 12), stream=TinyStream(2))
    assert [len(seen) for seen in strategy.seen] == [*steps, *steps]


def test_the_schedule_spans_what_a_stage_may_use(tmp_path: Path) -> None:
    """By steps it is the usual one; by samples it is the same where a step has as many samples as another."""
    rates = {}
    for unit, value in (("steps", 20), ("samples", 160)):
        strategy = Stages(2)
        run(
            tmp_path / unit, {"s": strategy}, Budget(unit, value), stream=TinyStream(1, per_class=16), schedule=LINEAR,
        )  # type: ignore[arg-type]  # fmt: skip
        rates[unit] = strategy.seen[0]
    assert len(rates["steps"]) == 20
    expected = [0.1 * min(i / 4, (20 - i) / 16) for i in range(20)]
    assert rates["steps"] == pytest.approx(expected)
    assert rates["samples"] == pytest.approx(expected, abs=1e-6)


def test_gradients_are_not_left_half_accumulated(tmp_path: Path) -> None:
    found = run(
        tmp_path, STRATEGIES["finetuning"](), Budget("samples", 20), trainer={"accumulate_grad_batches": 2},
        stream=TinyStream(1, per_class=32),
    )  # fmt: skip
    assert found.results.budget["used"] == [32]
    assert found.results.cost["steps"] == 2


def test_a_stage_that_uses_no_operations_ends_with_its_epochs(tmp_path: Path) -> None:
    class Kept(Stages):
        """Trains the head on random features: the backbone runs in no step."""

        def forward(self, learner: Any, batch: Any, run: Any) -> Any:
            return run({**batch, "features": torch.ones(len(batch["labels"]), learner.backbone.feature_size)})

    strategy = Kept(3)
    found = run(tmp_path, {"s": strategy}, Budget("flops", 1e6), stream=TinyStream(1, per_class=16))
    assert [len(seen) for seen in strategy.seen] == [12]
    assert found.results.budget["used"] == [0]


class Killed(Exception):
    pass


def budgeted(folder: Path, unit: Any, value: float, name: str) -> Experiment:
    strategies = {"s": Stages(1, 2)} if name == "stages" else STRATEGIES[name]()
    stream = TinyStream(scenario="class_incremental" if name == "stages" else scenario_of(*strategies))
    fitter = {"budget": Budget(unit, value), "checkpoint_every": 3}
    return make_experiment(folder, strategies, stream=stream, fitter=fitter, dropout=0.2, schedule=LINEAR)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Experiment]:
    @cache
    def run(unit: Any, value: float, name: str) -> Experiment:
        experiment = budgeted(tmp_path_factory.mktemp("whole"), unit, value, name)
        experiment.run()
        return experiment

    return run


@pytest.mark.parametrize(("unit", "value"), [("steps", 11), ("samples", 150), ("flops", 150 * FLOPS)])
@pytest.mark.parametrize("name", ["replay", "bic", "packnet", "stages"])
@pytest.mark.parametrize("batch", [2, 14, 21])
def test_a_killed_run_goes_on_to_the_same_bits(
    unit: Any, value: float, name: str, batch: int, undisturbed: Callable[..., Experiment], tmp_path: Path
) -> None:
    whole, killed, count = undisturbed(unit, value, name), budgeted(tmp_path, unit, value, name), 0

    def kill(*_: object) -> None:
        nonlocal count
        count += 1
        if count == batch:
            raise Killed

    killed.fitter.after_batch = kill
    with pytest.raises(Killed):
        killed.run()
    again = budgeted(tmp_path, unit, value, name)
    if (tmp_path / "results.json").exists():
        again.results = Results.load(tmp_path)
    again.run(resume=True)
    assert again.results.budget == whole.results.budget
    assert again.results.matrix == whole.results.matrix
    assert same(weights(again.learner), weights(whole.learner))
    assert again.results.cost["flops"] == whole.results.cost["flops"]


def test_what_was_stopped_when_its_budget_was_used_takes_no_step_more(tmp_path: Path) -> None:
    """A checkpoint is due at the very step that is the last: a run that goes on must not begin with another."""
    options: Any = {"fitter": {"budget": Budget("steps", 11), "checkpoint_every": 11}, "stream": TinyStream(2)}
    killed = make_experiment(tmp_path, STRATEGIES["finetuning"](), **options)

    def kill() -> None:
        if len(killed.results.matrix) == 1:
            raise Killed

    evaluate = killed._evaluate
    killed._evaluate = lambda: kill() or evaluate()  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(Killed):
        killed.run()
    again = make_experiment(tmp_path, STRATEGIES["finetuning"](), **options)
    assert again.run(resume=True).budget["used"] == [11, 11]
    assert again.learner.steps == 22


def test_a_crash_between_results_and_checkpoint_counts_no_experience_twice(tmp_path: Path) -> None:
    options: Any = {"fitter": {"budget": Budget("samples", 50)}}
    killed = make_experiment(tmp_path, STRATEGIES["replay"](), **options)
    save = killed._save

    def crash(name: str, index: int, stage: int) -> None:
        if index == 2:
            raise Killed
        save(name, index, stage)

    killed._save = crash  # type: ignore[method-assign]
    with pytest.raises(Killed):
        killed.run()
    assert len(Results.load(tmp_path).budget["used"]) == 2
    again = make_experiment(tmp_path, STRATEGIES["replay"](), **options)
    again.results = Results.load(tmp_path)
    assert len(again.run(resume=True).budget["used"]) == 3


def test_seconds_before_a_stop_count(tmp_path: Path) -> None:
    options: Any = {"fitter": {"budget": Budget("seconds", 0.4), "checkpoint_every": 5}, "stream": TinyStream(1)}
    killed = make_experiment(tmp_path, STRATEGIES["finetuning"](), **options)

    def kill(trainer: Any, learner: Any, batch_idx: int) -> None:
        if learner.seconds > 0.3:
            raise Killed

    killed.fitter.after_batch = kill
    with pytest.raises(Killed):
        killed.run()
    again, seen = make_experiment(tmp_path, STRATEGIES["finetuning"](), **options), []
    again.fitter.after_batch = lambda trainer, learner, batch_idx: seen.append(learner.seconds)
    again.run(resume=True)
    assert seen[0] > 0.2


def test_operations_before_the_training_of_an_experience_count(tmp_path: Path) -> None:
    class Looks(Stages):
        def before_experience(self, learner: Any, experience: Any) -> None:
            learner.features(experience.train)

    steps = {}
    for strategy in (Stages(2), Looks(2)):
        run(tmp_path / type(strategy).__name__, {"s": strategy}, Budget("flops", 64 * FLOPS), stream=TinyStream(1))
        steps[type(strategy)] = len(strategy.seen[0])
    assert steps[Stages] == 8
    assert 0 < steps[Looks] < 8


def test_asking_for_operations_changes_nothing() -> None:
    stream = TinyStream(1)
    learner = make_learner(stream, STRATEGIES["finetuning"]())
    learner.build(stream[0].info)
    learner(stream[0].train.fetch(torch.arange(5)))
    asked = [learner.flops.now(learner.backbone) for _ in range(3)]
    assert set(asked) == {5 * FLOPS}
    assert learner.flops.flush(learner.backbone) == 5 * FLOPS


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_run_on_a_budget_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, *TINY, "strategy=finetuning", "budget.steps=7")
    assert done.code == 0, done.err
    found = json.loads((only_run() / "results.json").read_text())
    assert found["budget"] == {"unit": "steps", "value": 7.0, "used": [7, 7]}
    assert found["cost"]["steps"] == 14
    assert "7 optimizer steps for each experience" in (only_run() / "report.md").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["budget.steps=0"], "budget.steps=0"),
        (["budget.steps=1.5"], "budget.steps=1.5"),
        (["+budget.epochs=3"], "budget.epochs: there is no such setting"),
        (["budget.steps=5", "budget.samples=5"], "budget.steps=5 and budget.samples both say when an experience ends"),
        (["budget.steps=5", "early_stopping=2"], "and so does early_stopping=2: give one of them"),
        (["budget.flops=1e6", "+trainer.max_steps=2"], "and so does trainer.max_steps: leave it out"),
        (["budget.seconds=2", "scheduler._target_=torch.optim.lr_scheduler.ConstantLR"], "scheduler"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(
    settings: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "backbone=mlp", "strategy=finetuning", "tracking=local", *settings)


def test_the_identity_of_a_run_without_a_budget_is_as_before() -> None:
    config: dict[str, Any] = {"seed": 0, "strategy": {"a": {"_target_": "x"}}}
    none = dict.fromkeys(("steps", "samples", "flops", "seconds", "bytes"))
    assert identity({**config, "budget": none}) == identity({**config, "budget": {}}) == identity(config)
    assert identity({**config, "budget": {**none, "steps": 5}}) != identity(config)
    assert identity({**config, "budget": {**none, "steps": 5}}) == identity({**config, "budget": {"steps": 5}})
    assert build_budget({"budget": none}) is build_budget(config) is None
    assert build_budget({"budget": {**none, "flops": 10}}) == Budget("flops", 10.0)


def test_trials_have_the_budget_too_and_references_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    tuned = ["protocol=tune_first", "protocol.trials=1", "protocol.experiences=1", "references=true"]
    done = call(capsys, "-m", *TINY, *tuned, "strategy=ewc", "stream.seed=1", "seed=1", "budget.steps=3")
    assert done.code == 0, done.err
    root = Path("multirun/default")
    (trial,), references = root.glob("tuning/*/trial_1"), [*root.glob("references/*/results.json")]
    assert json.loads((trial / "results.json").read_text())["budget"]["used"] == [3]
    assert yaml.safe_load((trial / "config.yaml").read_text())["budget"]["steps"] == 3
    assert references
    assert all(json.loads(path.read_text())["budget"] == {} for path in references)


def test_runs_on_other_budgets_are_not_averaged(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "-m", *TINY, "strategy=finetuning,replay", "budget.steps=null,3,5")
    assert done.code == 0, done.err
    text = Path("multirun/default/comparison.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## split_digits")]
    assert [t.rpartition("mlp")[2] for t in titles] == [
        "", ", 3 optimizer steps for each experience", ", 5 optimizer steps for each experience",
    ]  # fmt: skip
    assert text.count("Equal budget: ") == 2
    assert "| replay | 5 optimizer steps |" in text
    assert "trainer.max_epochs" not in text
