"""One job of a sweep: skipped when complete, continued when begun. Where jobs run side by side, each has a process of its
own, so that it can raise, exit or be killed and take nothing with it, and leaves a record in the sweep's folder.

`python -m clplatform.sweep` is such a process: what to do comes through its standard input, which stays open as long as
somebody waits for the result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from clplatform.config import identity
from clplatform.files import read_json, write_json
from clplatform.report import write_report
from clplatform.run import objective, show
from clplatform.types import ClplatformError

LOCK = ".lock"
SKIPPED = "{}: complete already"
PARENT = os.getppid()  # whoever has started this process: another one when that has ended


def sweep_job(config: dict[str, Any], run_dir: Path, *, notices: list[str]) -> float | None:
    """A job whose folder is named after its configuration: skipped when complete, continued when begun."""
    with alone(run_dir):
        if not (run_dir / "results.json").exists():
            return show(config, run_dir, notices=notices)
        if (results := complete(config, run_dir)) is None:
            return show(config, run_dir, resume=True, notices=notices)
        if not (run_dir / "report.html").exists():  # killed between its last result and its report
            write_report(run_dir)
        print(SKIPPED.format(run_dir))
        return objective(results)


def complete(config: dict[str, Any], run_dir: Path) -> dict[str, Any] | None:
    """The results of a job that has some, if nothing is left to do for it but perhaps its report.

    Raises:
        ClplatformError: they are another job's.
    """
    from omegaconf import OmegaConf

    there: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    if identity(there) != identity(config):  # hydra.sweep.subdir says something else than ${config_hash:}
        raise ClplatformError(f"{run_dir} holds a run of another configuration; give another hydra.sweep.dir or subdir")
    results = read_json(run_dir / "results.json")
    done = results["status"] == "completed" and (results.get("references") or not config.get("references"))
    return results if done else None


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Two jobs of a sweep may be one and the same, and two sweeps may share jobs: the second finds it complete."""
    from filelock import FileLock, Timeout

    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{run_dir}: another process is at it; waiting", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# -- a process for a job -----------------------------------------------------------------------------------------------


def run_apart(config: dict[str, Any], run_dir: Path, *, notices: list[str], record: Path) -> float | None:
    """`sweep_job` in a process of its own; what it prints goes into a file beside its record.

    Raises:
        ClplatformError: the job has not been completed, whatever happened to it.
    """
    outcome, log = record.with_suffix(".outcome"), record.with_suffix(".log")
    outcome.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    there = all((run_dir / name).exists() for name in ("results.json", "report.html"))
    if there and (results := complete(config, run_dir)) is not None:
        log.write_text(SKIPPED.format(run_dir) + "\n")  # a process takes seconds to find it out
        return objective(results)
    work = {"config": packed(config), "run_dir": str(run_dir), "notices": notices, "outcome": str(outcome)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-u", "-P", "-m", "clplatform.sweep"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us, who close its input
        ) as process,
    ):
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(work).encode() + b"\n")
            process.stdin.flush()
        code = wait(process)
    found = read_json(outcome) if outcome.exists() else {"problem": ended(code), "value": None}
    outcome.unlink(missing_ok=True)
    if found["problem"] is not None:
        raise ClplatformError(found["problem"])
    return found["value"]


def packed(config: dict[str, Any]) -> str:
    """A configuration for another process; strategies stay in their order, which is part of what they are."""
    return yaml.safe_dump(config, sort_keys=False)


def wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. joblib's workers outlive a command that is killed, and would go on with its jobs: they end with it, and
    the jobs are stopped as at a signal, with everything saved."""
    if not multiprocessing.current_process().name.startswith("LokyProcess"):
        return process.wait()
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if os.getppid() == PARENT:
                continue
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            os._exit(1)


def ended(code: int) -> str:
    """What an exit code says."""
    if code >= 0:
        return f"it ended with exit code {code} before it was complete"
    with suppress(ValueError):
        return f"it was ended by signal {signal.Signals(-code).name}"
    return f"it was ended by signal {-code}"


def main() -> None:
    """The process."""
    work = json.loads(sys.stdin.buffer.readline())  # from `run_apart`
    for name in ("SIGUSR1", "SIGUSR2"):  # schedulers send them to whoever submits a job again, and to us
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=stop_at_the_end_of_input, daemon=True).start()
    problem: str | None = None
    value: float | None = None
    try:
        value = sweep_job(yaml.safe_load(work["config"]), Path(work["run_dir"]), notices=work["notices"])
    except ClplatformError as error:
        problem = str(error)
    except Exception as error:
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    write_json(Path(work["outcome"]), {"problem": problem, "value": value})


def stop_at_the_end_of_input() -> None:
    """Nobody waits any more: stop as at a signal, with everything saved."""
    while os.read(sys.stdin.fileno(), 1024):  # not through its buffer, which the end of the process would wait for
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
