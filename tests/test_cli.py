"""Help, commands, completion, signals and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import TINY, call, only_run, refused

import clplatform
from clplatform.cli import HELP
from clplatform.config import conf_dir
from clplatform.files import read_json
from clplatform.listing import FOLDERS, KINDS

Capture = pytest.CaptureFixture[str]


# -- help and commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], ["strategy=ewc", "--help"], ["-m", "-h"]])
def test_help(arguments: list[str], capsys: Capture) -> None:
    done = call(capsys, *arguments)
    assert (done.code, done.out, done.err) == (0, HELP, "")


def test_version(capsys: Capture) -> None:
    assert call(capsys, "--version").out == f"{clplatform.__version__}\n"


@pytest.mark.parametrize("command", ["resume", "report", "diagnose", "predict", "list"])
def test_help_of_a_command(command: str, capsys: Capture) -> None:
    done = call(capsys, command, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"usage: clplatform {command}")
    assert f"clplatform {command}" in HELP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("resum x", "resum: neither a command nor a setting=value; did you mean resume?"),
        ("lst", "lst: neither a command nor a setting=value; did you mean list?"),
        ("train", "train: neither a command nor a setting=value; see `clplatform --help`"),
        ("resume", "resume: the following arguments are required: run; see `clplatform resume --help`"),
        ("resume a b", "resume: unrecognized arguments: b; see `clplatform resume --help`"),
        ("resume nowhere", "nowhere is not a run directory (no results.json and config.yaml in it)"),
        ("diagnose", "diagnose: the following arguments are required: run; see `clplatform diagnose --help`"),
        ("report nowhere", "nowhere: there is no such folder"),
        ("predict nowhere", "nowhere is neither a run directory nor a saved model"),
        ("list strategys", "list strategys: there is no such kind; did you mean strategies?"),
        ("list zzz", f"list zzz: there is no such kind; there is: {', '.join(KINDS)}"),
        ("list --config-dir nowhere", "--config-dir nowhere: there is no such folder"),
    ],
)
def test_wrong_commands(arguments: str, message: str, capsys: Capture) -> None:
    assert refused(capsys, *arguments.split()) == message


# -- list --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_list_names_everything_of_a_kind(kind: str, capsys: Capture) -> None:
    from clplatform.metric.matrix import METRICS

    done = call(capsys, "list", kind)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(kind)
    rows = {line.split()[0] for line in done.out.splitlines()[2:] if line.strip() and not line.startswith(" ")}
    pages = conf_dir() / FOLDERS.get(kind, "")
    assert rows == ({m.name for m in METRICS} if kind == "metrics" else {p.stem for p in pages.glob("*.yaml")})


def test_list_tells_what_a_strategy_needs_and_where_it_comes_from(capsys: Capture) -> None:
    out = call(capsys, "list").out
    assert [line.strip() for line in out.splitlines() if line.strip() in KINDS] == KINDS
    (ewc,) = (line for line in out.splitlines() if line.startswith("ewc "))
    assert ewc.split()[1:3] == ["regularization", "boundaries"]
    assert "Kirkpatrick et al. 2017" in ewc


def test_list_shows_pages_that_it_cannot_look_into(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "strategy").mkdir()
    for name, content in {
        "theirs": "# Elsewhere\ntheirs:\n  _target_: my.Own\n",
        "gone": "# Gone\ngone:\n  _target_: clplatform.strategy.gone.Gone\n",
        "flat": "# Not nested\n_target_: my.Own\n",
        "blank": "",
    }.items():
        (tmp_path / "strategy" / f"{name}.yaml").write_text(content)
    out = call(capsys, "list", "strategies", "--config-dir", ".").out
    assert {"theirs", "gone", "flat", "blank", "replay"} <= {
        line.split()[0] for line in out.splitlines() if line.strip()
    }


# -- completion ----------------------------------------------------------------------------------------------------------------


def completed(line: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    return set(call(capsys, "-sc", "query=bash").out.split())


def test_completion(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    script = call(capsys, "-sc", "install=bash").out
    assert "complete -o nospace -o default -F hydra_bash_completion clplatform" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "strategy=ewc" in completed("clplatform strategy=e", capsys, monkeypatch)
    assert completed("clplatform backbone=ml", capsys, monkeypatch) == {"backbone=mlp"}
    assert completed("clplatform strategy.replay.cap", capsys, monkeypatch) == {"strategy.replay.capacity="}
    assert refused(capsys, "-sc").startswith("Expecting one subcommand from ['install', 'uninstall', 'query']")


def test_a_reader_that_has_gone_is_no_error(capsys: Capture) -> None:
    read, write = os.pipe()
    os.close(read)
    for arguments in (["--help"], ["--cfg", "job"]):
        command = [sys.executable, "-m", "clplatform.cli", *arguments]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, "")


# -- signals -------------------------------------------------------------------------------------------------------------------

STOPPED = """
import os, signal
from clplatform.strategy.base import Strategy


class Stopped(Strategy):
    def __init__(self, *, number: int, process: str) -> None:
        self.number, self.process = number, process

    def before_experience(self, learner, experience):
        self.index = experience.index

    def after_batch(self, learner, batch, output):
        if self.index == 1 and self.process == "this":  # once: the handler may be another afterwards
            self.process = "gone"
            os.kill(os.getpid(), self.number)
"""


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A strategy that sends its process a signal in the second experience, and the settings to choose it."""
    (tmp_path / "stopping.py").write_text(STOPPED)
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    page = "stopped:\n  _target_: stopping.Stopped\n  number: ???\n  process: this\n"
    (tmp_path / "conf" / "strategy" / "stopped.yaml").write_text(page)
    monkeypatch.syspath_prepend(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background processes ignore it
    yield ["--config-dir", "conf", *TINY, "strategy=stopped"]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.modules.pop("stopping", None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_run_that_can_go_on(number: int, code: int, stopped: list[str], capsys: Capture) -> None:
    done = call(capsys, *stopped, f"strategy.stopped.number={int(number)}")
    run = only_run()
    assert done.code == code
    assert done.err.splitlines()[-1] == f"clplatform: stopped; `clplatform resume {run.absolute()}` goes on"
    assert "Traceback" not in done.err
    results = read_json(run / "results.json")
    assert (results["status"], results["error"], len(results["matrix"])) == ("running", None, 2)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("process: this", "process: gone"))
    assert call(capsys, "resume", str(run)).code == 0
    results = read_json(run / "results.json")
    assert (results["status"], len(results["matrix"])) == ("completed", 3)


def test_the_process_ends_with_the_code(stopped: list[str]) -> None:
    command = [sys.executable, "-m", "clplatform.cli", *stopped, f"strategy.stopped.number={int(signal.SIGTERM)}"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1].startswith("clplatform: stopped; `clplatform resume ")
