"""How far a sweep is, from the records of its jobs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from clplatform.files import write_json
from clplatform.progress import (
    LOST,
    Announcer,
    describe,
    ended,
    read_records,
    read_total,
    record,
    time_left,
    write_total,
)


def job(problem: str | None, *, begun: float = 0.0, seconds: float | None = None, done: bool = False) -> dict[str, Any]:
    return {"problem": problem, "begun": time.time() - begun, "seconds": seconds, "done": done}


def test_as_many_go_on_at_once_as_now() -> None:
    assert time_left(60, [], 3) == 180  # one after another
    assert time_left(60, [60, 30], 3) == (90 + 180) / 2
    assert time_left(60, [-20, 30], 0) == 15  # one takes longer than the mean


def test_what_has_ended_tells_how_long_the_rest_will_take() -> None:
    jobs = [
        job(None, seconds=90),
        job(None, seconds=110),
        job("no memory", seconds=5),
        job(LOST, begun=40),
        job(LOST, begun=60),
    ]
    assert describe(jobs, 9) == "2 of 9 jobs complete, 2 running, 1 failed, about 4:10 min left"
    skipped = [job(None, seconds=0.1, done=True)] * 3
    assert describe([*jobs, *skipped], 12) == "5 of 12 jobs complete, 2 running, 1 failed, about 4:10 min left"
    assert describe(skipped, 4) == "3 of 4 jobs complete, 0 running, 0 failed"  # nothing has been seen to take its time
    assert describe([*jobs[:3], *skipped], 6) == "5 of 6 jobs complete, 0 running, 1 failed"


def test_a_record_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    begun = record(tmp_path / "run", "seed=1")
    assert begun["problem"] == LOST and not begun["done"]
    after = ended(begun, None, 0.5)
    assert (
        after["problem"] is None and after["value"] == 0.5 and after["seconds"] >= 0 and after["settings"] == "seed=1"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").touch()
    assert record(tmp_path / "run", "seed=1")["done"]


def test_a_line_whenever_something_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clplatform.progress.SECONDS", 0.01)
    announcer, said = Announcer(tmp_path, 2), ""

    def wait_for(line: str) -> None:
        nonlocal said
        for _ in range(500):
            said += capsys.readouterr().out
            if line in said:
                return
            time.sleep(0.01)
        raise AssertionError(said)

    first = record(tmp_path / "run", "")
    write_json(tmp_path / "0.json", first)
    wait_for("0 of 2 jobs complete, 1 running, 0 failed\n")
    write_json(tmp_path / "0.json", ended(first, "it raised"))
    wait_for("0 of 2 jobs complete, 0 running, 1 failed\n")
    announcer.stopped.set()
    assert said.count("\n") == 2 and list(read_records(tmp_path)) == [0]


def test_the_number_of_jobs_is_kept(tmp_path: Path) -> None:
    assert read_total(tmp_path) == 0
    write_total(tmp_path, 12)
    assert read_total(tmp_path) == 12
