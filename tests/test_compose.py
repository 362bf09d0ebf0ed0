"""Runs and sweeps from the command line: folders, flags, jobs that fail, and strategies of one's own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import TINY, Done, call, only_run, refused
from omegaconf import OmegaConf

import clplatform
from clplatform.config import identity
from clplatform.files import read_json
from clplatform.types import ClplatformError

Capture = pytest.CaptureFixture[str]

MINE = '''
"""Shrink (a strategy of one's own)."""

import os
from pathlib import Path
from typing import Annotated

from annotated_types import Gt, Le

from clplatform.strategy.base import Strategy


class Shrink(Strategy):
    """Scale gradients after the first experience. Fails while `fail_if` is there, in the second experience."""

    family = "regularization"

    def __init__(self, *, factor: Annotated[float, Gt(0), Le(1)], fail_if: str) -> None:
        self.factor, self.fail_if, self.steps = factor, fail_if, []

    def before_experience(self, learner, experience):
        self.index = experience.index
        with open(f"{self.factor}.log", "a") as log:
            log.write(f"{experience.index + 1} ")
        if experience.index == 1 and Path(self.fail_if).exists():
            raise RuntimeError("the disk is on fire")

    def edit_gradients(self, learner):
        if self.index > 0:
            for p in learner.parameters():
                if p.grad is not None:
                    p.grad *= self.factor
'''
PAGE = """# Scale the gradients of all experiences but the first
shrink:
  _target_: my_strategies.Shrink
  factor: 0.5
  fail_if: fire
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A strategy outside the package: a module on the path, and its page in `mine/conf`."""
    (tmp_path / "mine" / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "mine" / "my_strategies.py").write_text(MINE)
    (tmp_path / "mine" / "conf" / "strategy" / "shrink.yaml").write_text(PAGE)
    monkeypatch.syspath_prepend(tmp_path / "mine")
    yield
    sys.modules.pop("my_strategies", None)


def own(capsys: Capture, *arguments: str) -> Done:
    return call(capsys, "--config-dir", "mine/conf", *TINY, *arguments)


def jobs(name: str = "default") -> dict[str, Path]:
    """Run directories of a sweep by their strategies."""
    return {
        "+".join(read_json(path)["strategy"]): path.parent for path in Path("multirun", name).glob("*/results.json")
    }


# -- a run ---------------------------------------------------------------------------------------------------------------


def test_a_run_and_the_same_run_again(capsys: Capture) -> None:
    """Nothing of the first is left in the process that would change the second."""
    before = list(sys.argv)
    first = call(capsys, *TINY)
    second = call(capsys, *TINY)
    assert (first.code, second.code) == (0, 0)
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ
    one, other = (read_json(p) for p in sorted(Path("outputs").glob("default/*/results.json")))
    assert one["status"] == "completed"
    assert one["matrix"] == other["matrix"]
    assert "Accuracy" in first.out
    report = Path(first.out.rstrip().rpartition("\n")[2].removeprefix("Report: "))
    assert report.is_file()
    run = report.parent
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}", run.name)  # runs begun in the same second stay apart
    assert {"results.json", "config.yaml", "environment.json", "accuracy_matrix.csv", ".hydra"} <= {
        p.name for p in run.iterdir()
    }
    assert yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text()) == TINY
    assert refused(capsys, *TINY, "seed=1", f"hydra.run.dir={run}") == (  # and writes nothing, not even into .hydra/
        f"{run} holds a run already; go on with `clplatform resume {run}`"
    )


def test_a_refused_run_leaves_what_was_there(capsys: Capture) -> None:
    """Even where the run was to be written into a folder with other files of the same names."""
    for name in ("config.yaml", "environment.json", "notes.txt"):
        Path(name).write_text("mine")
    Path("outputs").mkdir()
    assert refused(capsys, "backbone=mlp", "batch_size=0", "hydra.run.dir=.").startswith("batch_size=0")
    assert refused(capsys, "backbone=mlp", "stream.n_experiences=3", "hydra.run.dir=.").startswith("stream.n_exp")
    assert refused(capsys, "backbone=mlp", "batch_size=0").startswith("batch_size=0")
    assert refused(capsys, "-m", "sed=0,1").startswith("sed=0,1")


def test_a_folder_that_cannot_be_made(capsys: Capture) -> None:
    Path("file").write_text("not a folder")
    message = "file/x: no folder can be made there (Not a directory)"
    assert refused(capsys, *TINY, "hydra.run.dir=file/x") == message
    assert refused(capsys, "-m", *TINY, "hydra.sweep.dir=file/x") == message


def test_a_run_that_fails_shows_where(capsys: Capture, mine: None) -> None:
    Path("fire").touch()
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        own(capsys, "strategy=shrink")
    run = only_run()
    results = read_json(run / "results.json")
    assert results["status"] == "failed"
    assert results["error"] == {"type": "RuntimeError", "message": "the disk is on fire"}
    assert len(results["matrix"]) == 2  # before any training, and after the first experience
    assert "my_strategies.py" in (run / "traceback.txt").read_text()
    Path("fire").unlink()
    assert call(capsys, "resume", str(run)).code == 0
    assert read_json(run / "results.json")["status"] == "completed"
    assert not (run / "traceback.txt").exists()
    assert Path("0.5.log").read_text() == "1 2 2 "  # the first experience was not learned again
    assert call(capsys, "resume", str(run)).out == f"{run}: complete already\n"


# -- flags -----------------------------------------------------------------------------------------------------------------


def test_cfg_prints_the_configuration_and_stops(capsys: Capture) -> None:
    done = call(capsys, "--cfg", "job", "strategy=[replay,lwf]", "seed=7", "experiment=split_mnist_mlp")
    config = yaml.safe_load(done.out)
    assert (done.code, done.err) == (0, "")
    assert list(config["strategy"]) == ["replay", "lwf"]
    assert (config["seed"], config["stream"]["name"], config["backbone"]["name"]) == (7, "split_mnist", "mlp")
    assert config["trainer"]["max_epochs"] == 22
    resolved = yaml.safe_load(call(capsys, "--cfg", "job", "--resolve", "backbone=minilm").out)
    assert resolved["optimizer"]["lr"] == resolved["backbone"]["lr"]
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hlep", "--hlep: there is no such option; did you mean --help?"),
        ("--multi-run seed=0,1", "--multi-run: there is no such option; did you mean --multirun?"),
        ("-m --cfg job", "Only one of --run, --multirun, --cfg, --info and --shell_completion can be specified"),
        ("--config-name=nothing", "Cannot find primary config 'nothing'. Check that it's in your config search path."),
    ],
)
def test_wrong_flags(arguments: str, message: str, capsys: Capture) -> None:
    assert refused(capsys, *arguments.split()) == message


def test_a_wrong_choice_of_a_flag(capsys: Capture) -> None:
    message = refused(capsys, "--cfg", "jobs")
    assert message.startswith("argument --cfg/-c: invalid choice: 'jobs'")
    assert message.endswith("; see `clplatform --help`")


@pytest.mark.parametrize("setting", ["strategy=[replay,replay]", "strategy=[replay, lwf, replay]"])
def test_a_strategy_named_twice(setting: str, capsys: Capture) -> None:
    assert refused(capsys, setting) == f"{setting}: replay is named twice"
    assert refused(capsys, "-m", f"{setting},[ewc]") == f"{setting},[ewc]: replay is named twice"


# -- sweeps ----------------------------------------------------------------------------------------------------------------


def test_a_sweep_compares_its_jobs_and_runs_only_what_is_missing(capsys: Capture) -> None:
    """A setting for one strategy is dropped from the jobs of another, which are the same jobs as without it."""
    done = call(capsys, "-m", *TINY, "strategy=ewc,replay", "++strategy.ewc.samples=8")
    assert done.code == 0
    assert done.err == "clplatform: strategy.ewc is set but ewc is not among the strategies of this job: ignored\n"
    assert f"Comparison of 2 runs: {Path('multirun/default/comparison.html').absolute()}\n" in done.out
    assert "Job 2: " in done.out
    made = jobs()
    assert set(made) == {"ewc", "replay"}
    for run in made.values():
        config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        assert identity(config) == run.name
    ghost = read_json(made["replay"] / "results.json")["notes"]
    assert any("strategy.ewc is set" in note for note in ghost)
    times = {name: (run / "results.json").stat().st_mtime_ns for name, run in made.items()}

    again = call(capsys, "-m", *TINY, "strategy=replay,finetuning", "tracking.every_n_steps=1")
    assert again.code == 0
    assert f"{made['replay'].absolute()}: complete already\n" in again.out
    assert "Comparison of 2 runs" in again.out
    assert set(jobs()) == {"ewc", "replay", "finetuning"}
    assert times == {name: (run / "results.json").stat().st_mtime_ns for name, run in made.items()}


def test_a_job_that_fails_does_not_stop_the_others_and_is_continued(capsys: Capture, mine: None) -> None:
    """With a strategy of one's own, whose settings are dropped from the other job too."""
    Path("fire").touch()
    sweep = ["-m", "strategy=shrink,finetuning", "++strategy.shrink.factor=0.25"]
    done = own(capsys, *sweep)
    assert done.code == 1
    failed, complete = jobs()["shrink"], jobs()["finetuning"]
    first, notice, last = done.err.splitlines()
    assert first.startswith(f"clplatform: job {failed.name} (backbone=mlp ")
    assert first.endswith(" failed: RuntimeError: the disk is on fire")
    assert notice == "clplatform: strategy.shrink is set but shrink is not among the strategies of this job: ignored"
    assert last == f"clplatform: 1 of 2 jobs failed ({failed.name}); the same command runs only what is missing"
    assert "Comparison of 2 runs" in done.out
    assert read_json(failed / "results.json")["status"] == "failed"
    assert (failed / "traceback.txt").is_file()

    Path("fire").unlink()
    done = own(capsys, *sweep)
    assert (done.code, done.err) == (0, "")
    assert f"{complete.absolute()}: complete already\n" in done.out
    assert read_json(failed / "results.json")["status"] == "completed"
    assert Path("0.25.log").read_text() == "1 2 2 "  # the first experience was not learned again


def test_jobs_that_are_refused_leave_no_folder(capsys: Capture) -> None:
    done = call(capsys, "-m", *TINY, "batch_size=0,-1")
    assert done.code == 1
    assert [line.rpartition("failed")[2] for line in done.err.splitlines()[:2]] == [
        f": batch_size={n}: input should be greater than or equal to 1" for n in (0, -1)
    ]
    assert "2 of 2 jobs failed" in done.err
    assert list(Path.cwd().iterdir()) == []


def test_a_folder_of_another_configuration_is_not_taken_for_complete(capsys: Capture) -> None:
    sweep = ["-m", *TINY, "hydra.sweep.subdir=job"]
    assert call(capsys, *sweep, "seed=0").code == 0
    done = call(capsys, *sweep, "seed=1")
    assert done.code == 1
    assert "job holds a run of another configuration; give another hydra.sweep.dir or subdir" in done.err
    assert read_json(Path("multirun/default/job/results.json"))["seed"] == 0
    assert call(capsys, *sweep, "seed=0").code == 0


# -- a strategy of one's own -----------------------------------------------------------------------------------------------


def test_a_strategy_of_one_s_own_from_page_to_prediction(capsys: Capture, mine: None) -> None:
    done = own(capsys, "strategy=[replay,shrink]", "strategy.shrink.factor=0.25")
    assert done.code == 0
    run = only_run()
    assert read_json(run / "results.json")["strategy"] == ["replay", "shrink"]
    assert Path("0.25.log").read_text() == "1 2 "
    with pytest.raises(ClplatformError, match=r"builds 'my_strategies\.Shrink'.*trust='my_strategies'"):
        clplatform.load(run)
    assert clplatform.load(run, trust="my_strategies").info.n_experiences == 2

    listed = call(capsys, "list", "strategies", "--config-dir", "mine/conf").out
    assert "Scale the gradients of all experiences but the first" in listed
    assert refused(capsys, "--config-dir=mine/conf", "backbone=mlp", "strategy=shrink", "strategy.shrink.factor=2") == (
        "strategy.shrink.factor=2: input should be less than or equal to 1"
    )
