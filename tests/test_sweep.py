"""Sweeps through other engines: whatever one job does, the others go on, and the same command runs what is missing."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import TINY, call, refused
from filelock import FileLock

from clplatform.config import identity
from clplatform.files import read_json, write_json
from clplatform.run import objective
from clplatform.sweep import ended, packed, run_apart
from clplatform.threads import available
from clplatform.types import ClplatformError

Capture = pytest.CaptureFixture[str]

TROUBLE = '''
"""Trouble (a strategy for tests)."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt

from clplatform.strategy.base import Strategy
from clplatform.threads import available


class Trouble(Strategy):
    """In the second experience: raise, exit or be killed, while the file `fire` is there."""

    family = "regularization"

    def __init__(self, *, do: Literal["raise", "exit", "kill", "orphan", "sleep", "nothing"], factor: Annotated[float, Gt(0)]) -> None:
        self.do, self.factor, self.steps = do, factor, []

    def before_experience(self, learner, experience):
        with open(f"{self.do}.log", "a") as log:
            log.write(f"{experience.index + 1}:{available()} ")
        if self.do == "sleep" and Path("fire").exists():
            time.sleep(60)
        if experience.index == 1 and Path("fire").exists():
            if self.do == "raise":
                raise RuntimeError("the disk is on fire")
            if self.do == "exit":
                sys.exit(0)
            if self.do == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.do == "orphan":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)
'''
PAGE = """# Trouble
trouble:
  _target_: trouble.Trouble
  do: nothing
  factor: 1.0
"""
PARALLEL = ["sweep=local_parallel"]
SUBMITIT = ["-m", "hydra/launcher=submitit_local"]
RAY = ["sweep=ray", "+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"]


def needs(module: str, extra: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.{module}")
    return pytest.mark.skipif(not there, reason=f"clplatform[{extra}] is not installed")


joblib = needs("hydra_joblib_launcher", "parallel")
optuna = needs("hydra_optuna_sweeper", "optuna")
submitit = needs("hydra_submitit_launcher", "slurm")
ray = needs("hydra_ray_launcher", "ray")


@pytest.fixture(autouse=True)
def trouble() -> None:
    Path("mine/conf/strategy").mkdir(parents=True)
    Path("mine/trouble.py").write_text(TROUBLE)
    Path("mine/conf/strategy/trouble.yaml").write_text(PAGE)


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, with the strategy above."""
    command = [sys.executable, "-m", "clplatform.cli", "--config-dir=mine/conf", *TINY, *arguments]
    path = os.pathsep.join([str(Path("mine").absolute()), *(p for p in sys.path if p)])
    env = {**os.environ, "PYTHONPATH": path, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def sweep(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, "".join(line for line in err.splitlines(True) if line.startswith("clplatform: "))


def status() -> dict[str, str]:
    """By what the strategy does, or its name."""
    found = {}
    for path in Path("multirun/default").glob("*/results.json"):
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        (node,) = config["strategy"].values()
        found[node.get("do", config["name"])] = read_json(path)["status"]
    return found


def records() -> list[Path]:
    """What the jobs of the last call have left."""
    return sorted(sorted(Path("multirun/default/jobs").iterdir())[-1].iterdir())


def logs() -> list[str]:
    """What the jobs of the last call have printed."""
    return [path.read_text() for path in records() if path.suffix == ".log"]


def wait_until_stopped(folder: str = "multirun/default") -> None:
    """Until no job is at any run, or raise."""
    for lock in Path(folder).glob("*/.lock"):
        with FileLock(lock, timeout=20):
            pass


# -- presets -----------------------------------------------------------------------------------------------------------------


def test_a_preset_is_not_part_of_what_a_job_is(capsys: Capture) -> None:
    done = call(capsys, "sweep=seeds", *TINY, "seed=0,1")
    assert done.code == 0
    assert "Comparison of 2 runs" in done.out
    again = call(capsys, "-m", *TINY, "seed=0")
    assert again.code == 0
    assert "complete already" in again.out


def test_a_run_that_was_killed_before_its_report_gets_it(capsys: Capture) -> None:
    command = ["-m", *TINY, "seed=0", "stream.seed=${seed}", "references=true", "hydra.sweep.dir=out"]
    first = call(capsys, *command)
    assert first.code == 0
    assert "stream.seed=${seed}" in first.out  # as typed, to be typed again
    (run,) = [path.parent for path in Path("out").glob("*/results.json")]
    before = read_json(run / "results.json")
    (run / "report.html").unlink()
    assert "complete already" in call(capsys, *command).out
    assert (run / "report.html").exists()
    write_json(run / "results.json", {**before, "references": {}})  # killed before its reference runs
    done = call(capsys, *command)
    assert done.code == 0, done.err
    assert "complete already" not in done.out
    assert read_json(run / "results.json")["references"] == before["references"]
    assert read_json(run / "results.json")["matrix"] == before["matrix"]


def test_a_process_of_its_own_is_given_the_same_job(capsys: Capture) -> None:
    """The order of strategies is part of a job: `[replay,lwf]` and `[lwf,replay]` are two."""
    config = yaml.safe_load(call(capsys, *TINY, "strategy=[replay,lwf]", "--cfg", "job", "--resolve").out)
    assert list(config["strategy"]) == ["replay", "lwf"]
    assert identity(yaml.safe_load(packed(config))) == identity(config)


def test_what_is_complete_takes_no_process(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, record = Path("run"), tmp_path / "jobs" / "0.json"
    assert call(capsys, *TINY, f"hydra.run.dir={run}").code == 0
    config = yaml.safe_load((run / "config.yaml").read_text())

    def started(*_: object, **__: object) -> None:
        raise RuntimeError("a process")

    monkeypatch.setattr(subprocess, "Popen", started)
    value = run_apart(config, run, notices=[], record=record)
    assert value == objective(read_json(run / "results.json"))
    assert "complete already" in record.with_suffix(".log").read_text()
    with pytest.raises(RuntimeError, match="a process"):  # it has no references yet
        run_apart({**config, "references": True}, run, notices=[], record=record)
    with pytest.raises(ClplatformError, match="another configuration"):
        run_apart({**config, "seed": 7}, run, notices=[], record=record)


def test_an_engine_that_is_not_installed(capsys: Capture) -> None:
    if importlib.util.find_spec("ray"):
        pytest.skip("it is installed")
    assert refused(capsys, "sweep=ray", "backbone=mlp") == (
        "sweep=ray: ray is not installed; it comes with clplatform[ray] (pip install 'clplatform[ray]')"
    )


@pytest.mark.parametrize(
    ("preset", "key", "value"),
    [
        ("grid", "sweeper.params.strategy", "finetuning,ewc,lwf,replay,joint"),
        pytest.param("[seeds,local_parallel]", "launcher.n_jobs", 2, marks=joblib),
        pytest.param("optuna", "sweeper.direction", "maximize", marks=optuna),
        pytest.param("slurm", "launcher.array_parallelism", 16, marks=submitit),
        pytest.param("ray", "launcher.ray.remote.num_cpus", 1, marks=ray),
    ],
)
def test_what_a_preset_says(preset: str, key: str, value: Any, capsys: Capture) -> None:
    node = yaml.safe_load(call(capsys, "--cfg", "hydra", f"sweep={preset}").out)["hydra"]
    assert node["mode"] == "MULTIRUN"
    for part in key.split("."):
        node = node[part]
    assert node == value


def test_how_a_process_has_ended() -> None:
    assert ended(-signal.SIGKILL) == "it was ended by signal SIGKILL"
    assert ended(0) == "it ended with exit code 0 before it was complete"


# -- side by side ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(PARALLEL, marks=joblib, id="joblib"),
        pytest.param(SUBMITIT, marks=submitit, id="submitit"),
        pytest.param(RAY, marks=ray, id="ray"),
    ],
)
def test_whatever_a_job_does_the_others_go_on(engine: list[str]) -> None:
    Path("fire").touch()
    command = [*engine, "strategy=trouble", "strategy.trouble.do=kill,raise,exit,nothing"]
    code, out, err = sweep(*command)
    assert code == 1
    assert status() == {"kill": "running", "raise": "failed", "exit": "running", "nothing": "completed"}
    *told, last = err.splitlines()
    reasons = ["ended by signal SIGKILL", "RuntimeError: the disk is on fire", "exit code 0 before it was complete"]
    assert [reason in line for reason, line in zip(reasons, told, strict=True)] == [True] * 3
    assert last.startswith("clplatform: 3 of 4 jobs failed (")
    assert last.endswith("; the same command runs only what is missing")
    assert "Comparison of 4 runs" in out
    assert "RuntimeError: the disk is on fire" in logs()[1]

    Path("fire").unlink()
    code, out, err = sweep(*command)
    assert (code, err) == (0, "")
    assert set(status().values()) == {"completed"}
    assert "complete already" in logs()[3]
    for name in ("raise", "exit", "kill"):  # the first experience was not learned again
        assert [entry[0] for entry in Path(f"{name}.log").read_text().split()] == ["1", "2", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [pytest.param(PARALLEL, marks=joblib, id="joblib"), pytest.param(SUBMITIT, marks=submitit, id="submitit")],
)
def test_an_engine_that_loses_a_process(engine: list[str]) -> None:
    """joblib loses all its jobs with it; none ends well unseen, and the same command goes on."""
    Path("fire").touch()
    command = [*engine, "strategy=trouble", "strategy.trouble.do=orphan,nothing", "seed=0,1"]
    code, _, err = sweep(*command)
    assert code == 1
    assert "its process ended without a word" in err
    assert err.splitlines()[-1].endswith("; the same command runs only what is missing")
    if engine == SUBMITIT:
        assert [read_json(p)["problem"] is None for p in sorted(records()) if p.suffix == ".json"] == [
            False,
            False,
            True,
            True,
        ]
    wait_until_stopped()  # nobody waits for its result any more
    Path("fire").unlink()
    code, _, err = sweep(*command)
    assert (code, err) == (0, "")


@pytest.mark.slow
@joblib
def test_jobs_share_the_cores_and_twins_run_once() -> None:
    code, _, err = sweep(*PARALLEL, "strategy=trouble", "seed=0,0", "threads=null")
    assert (code, err) == (0, "")
    assert Path("nothing.log").read_text() == f"1:{max(1, available() // 2)} 2:{max(1, available() // 2)} "
    assert sorted("complete already" in log for log in logs()) == [False, True]


@pytest.mark.slow
@joblib
def test_jobs_share_their_trials_and_references() -> None:
    tuned = ["protocol=tune_first", "protocol.trials=2", "protocol.experiences=1", "references=true"]
    code, _, err = sweep(*PARALLEL, *tuned, "strategy=ewc", "stream.seed=1", "seed=1,2")
    assert (code, err) == (0, "")
    assert sorted("trial 1/2" in log for log in logs()) == [False, True]
    runs = [read_json(path) for path in Path("multirun/default").glob("*/results.json")]
    assert [set(run["references"]) for run in runs] == [{"joint", "independent", "untrained"}] * 2
    assert len(list(Path("multirun/default/tuning").glob("*/tuning.json"))) == 1


@pytest.mark.slow
@joblib
def test_a_sweep_that_is_told_to_stop_stops_its_jobs_and_goes_on_later() -> None:
    Path("fire").touch()
    command = [*PARALLEL, "strategy=trouble", "strategy.trouble.do=sleep", "seed=0,1"]
    process = start(*command)
    for _ in range(600):
        if len(Path("sleep.log").read_text().split()) >= 2 if Path("sleep.log").exists() else False:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    wait_until_stopped()
    Path("fire").unlink()
    found = [read_json(path)["status"] for path in Path("multirun/default").glob("*/results.json")]
    assert found == ["running"] * 2
    code, _, err = sweep(*command)
    assert (code, err) == (0, "")


def without_times(folder: Path) -> tuple[list[dict[str, str]], list[list[str]]]:
    """comparison.csv and comparison.md of a sweep, but for what depends on the machine: columns of times, and cells with a
    time or a size in memory."""
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    for row in rows:
        assert float(row.pop("seconds")) > 0
    lines, times = [], set()
    for line in (folder / "comparison.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        times = {i for i, cell in enumerate(cells) if cell in ("seconds", "time")} | (
            times if len(cells) > 1 else set()
        )
        kept = [cell for i, cell in enumerate(cells) if i not in times]
        lines.append([re.sub(r"^\d[\d.,:]* (ms|s|min|h|d|KiB|MiB|GiB)$", "…", cell) for cell in kept])
    return rows, lines


@pytest.mark.slow
@joblib
def test_a_sweep_that_is_killed_does_what_is_missing_and_compares_the_same() -> None:
    """kill -9 of the command in the middle; the same command again, and a sweep that nobody has disturbed."""
    command = [*PARALLEL, "strategy=trouble", "seed=0,1,2,3", "trainer.max_epochs=400", "checkpoint.every_n_batches=50"]

    def found() -> dict[Path, str]:
        return {path: read_json(path)["status"] for path in Path("killed").glob("*/results.json")}

    process = start(*command, "hydra.sweep.dir=killed")
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        states = [*found().values()]
        if "completed" in states and "running" in states:
            break
        time.sleep(0.02)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.communicate(timeout=60)  # until its workers, who have its output, have ended too
    wait_until_stopped("killed")
    done = {path: path.stat().st_mtime_ns for path, state in found().items() if state == "completed"}
    begun = [*found().values()].count("running")
    assert done
    assert len(done) < 4  # it was in the middle
    first = Path("nothing.log").read_text().split()

    code, _, err = sweep(*command, "hydra.sweep.dir=killed")
    assert (code, err) == (0, "")
    assert len(found()) == 4
    assert set(found().values()) == {"completed"}
    assert {path: path.stat().st_mtime_ns for path in done} == done  # not made again
    again = Path("nothing.log").read_text().split()[len(first) :]
    learned = sum(len(read_json(path)["timing"]) for path in found())
    assert learned == 8
    assert len(again) <= 8 - 2 * len(done)
    assert len(first) + len(again) <= 8 + begun  # of each job that was killed, an experience was begun twice

    code, _, err = sweep(*command, "hydra.sweep.dir=whole")
    assert (code, err) == (0, "")
    assert without_times(Path("killed")) == without_times(Path("whole"))


# -- a search ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@optuna
def test_a_search_goes_on_where_it_was() -> None:
    Path("fire").touch()
    command = ["sweep=optuna", "strategy=trouble", "strategy.trouble.factor=tag(log,interval(1,1e5))"]
    code, _, err = sweep(*command, "strategy.trouble.do=raise", "hydra.sweeper.n_trials=2")
    assert code == 1
    assert "2 of 2 jobs failed" in err
    first = {path.parent.name for path in Path("multirun/default").glob("*/results.json")}
    assert len(first) == 2

    Path("fire").unlink()
    code, out, err = sweep(*command, "strategy.trouble.do=raise", "hydra.sweeper.n_trials=3")
    assert (code, err) == (0, "")
    runs = {path.parent.name: read_json(path)["status"] for path in Path("multirun/default").glob("*/results.json")}
    assert set(runs.values()) == {"completed"}
    assert first < set(runs)
    assert len(runs) == 3
    assert [entry[0] for entry in Path("raise.log").read_text().split()] == [*"1212", *"2212"]
    best = yaml.safe_load(Path("multirun/default/optimization_results.yaml").read_text())
    assert 0 <= best["best_value"] <= 1
    assert "Best of the search" in out

    code, out, err = sweep(*command, "strategy.trouble.do=raise", "hydra.sweeper.n_trials=3")
    assert (code, err) == (0, "")
    assert "Comparison of 3 runs" in out
    assert "Job" not in out
