"""`report --watch`: a run in another process, while it goes on, is rewritten, ends, fails or is killed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import TINY, call
from rich.console import Console
from world import make_experiment

from clplatform.report import watch as module
from clplatform.report.watch import losses, run_view, tail, watch
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import ClplatformError

SLOW = [*TINY[:2], "stream.n_experiences=5", *TINY[3:], "tracking.every_n_steps=1", "strategy=replay"]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clplatform.cli", *SLOW, *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120, legacy_windows=False)


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("live", [True, False], ids=["terminal", "file"])
def test_a_run_in_another_process_is_followed_to_its_end(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.02)
    run = Path("out/a")
    process = start(f"hydra.run.dir={run}", "trainer.max_epochs=30")
    wait_for(run / ".hydra")  # before there is a record
    console = terminal() if live else Console(file=io.StringIO(), width=120)
    seen = []
    look = module.run_view

    def looking(*arguments: Any) -> Any:
        view = look(*arguments)
        seen.append(view)
        return view

    monkeypatch.setattr(module, "run_view", looking)
    assert watch(run, console) == 0
    process.communicate(timeout=60)
    assert process.returncode == 0
    learned = [view.key[1] for view in seen if isinstance(view.key, tuple)]
    assert learned == sorted(learned)
    assert len(set(learned)) >= 3  # it was seen while it went on
    assert seen[-1].key == ("completed", 5)
    text = written(console)
    assert "replay on split_digits, seed 0" in text.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert "completed" in text
    assert "5/5 experiences" in text
    assert "running" in text
    if live:
        assert "losses" in text
        assert "left" in text
    else:
        assert text.count("after") >= 3


def test_a_sweep_is_followed_until_it_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.05)
    process = start("-m", "seed=0,1", "hydra.sweep.dir=out", "trainer.max_epochs=5")
    wait_for(Path("out"))
    while not list(Path("out").glob("*/.hydra")):
        time.sleep(0.05)
    console = Console(file=io.StringIO(), width=140)
    assert watch(Path("out"), console) == 0
    assert Path("out/comparison.html").exists()
    assert "2 of 2 runs complete" in written(console)
    assert written(console).rstrip().count("5/5") >= 2
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_what_is_finished_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_experiment(tmp_path / "a", {"finetuning": Finetuning()}).run()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    done = call(capsys, "report", str(tmp_path / "a"), "--watch")
    assert done.code == 0
    assert done.out.count("completed") == 1
    assert "3/3 experiences" in done.out
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}  # it only reads
    for path in (tmp_path / "a" / "results.json", tmp_path / "a" / "metrics.jsonl"):
        if path.exists():
            os.utime(path, (time.time() - 100, time.time() - 100))
    assert call(capsys, "report", str(tmp_path), "--watch").out.count("completed") == 1


def test_a_failed_run_ends_the_watch_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_experiment(tmp_path, {"finetuning": Finetuning()}).run()
    path = tmp_path / "results.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "status": "failed", "error": {"type": "OSError", "message": "disk full"}}))
    done = call(capsys, "report", str(tmp_path), "--watch")
    assert done.code == 1
    assert "OSError: disk full" in done.out


def test_a_file_that_cannot_be_read_now_is_read_later(tmp_path: Path) -> None:
    make_experiment(tmp_path, {"finetuning": Finetuning()}).run()
    path = tmp_path / "results.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), "status": "running"}))
    steps = [lambda: path.write_text(whole[: len(whole) // 2]), path.unlink, lambda: path.write_text(whole)]

    def sleep(_: float) -> None:
        steps.pop(0)()

    console = Console(file=io.StringIO(), width=120)
    assert watch(tmp_path, console, sleep=sleep) == 0
    assert not steps
    assert "completed" in written(console)


def test_a_run_that_was_killed_is_said_to_be_silent(tmp_path: Path) -> None:
    make_experiment(tmp_path, {"finetuning": Finetuning()}).run()
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "running"}))
    for file in [path, *tmp_path.rglob("*.ckpt"), *tmp_path.glob("*.jsonl")]:
        os.utime(file, (time.time() - 600, time.time() - 600))
    console = Console(file=io.StringIO(), width=200)
    view = run_view(tmp_path, console)
    console.print(view.shown)
    assert not view.ended
    assert "nothing was written for 10:00 min" in written(console)


def test_the_last_losses_of_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert tail(path) == []
    rows = [{"step": i, "train/loss": 1 / i, "train/lr": 0.1} for i in range(1, 3000)]
    path.write_text(
        "".join(json.dumps(r) + "\n" for r in [*rows, {"step": 3000, "validation/accuracy": 1.0}]) + '{"step": 30'
    )
    found = tail(path)
    assert 10 < len(found) < 2999  # not all of it is read
    assert losses(found) == {"loss": 1 / 2999}


def test_what_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(ClplatformError, match="no runs in"):
        watch(tmp_path)
    with pytest.raises(ClplatformError, match="there is no such folder"):
        watch(tmp_path / "nowhere")
