from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clplatform.tracking.local import read
from clplatform.tracking.tracker import Tracker
from clplatform.tracking.wandb import Wandb, chosen_mode, run_name

CONFIG = {"seed": 3, "strategy": {"replay": {"capacity": 200}, "lwf": {}}, "stream": {"name": "split_digits"}}
MATRIX: list[list[float | None]] = [[0.25, None], [1.0, None], [0.5, 0.875]]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DISABLED", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def page(**changes: Any) -> Wandb:
    values: dict[str, Any] = {
        "every_n_steps": 10, "mode": "auto", "project": "clplatform", "entity": None, "group": "default", "tags": ["a"],
        "name": None, "init_timeout": 2.0, "finish_timeout": 5.0, "report": True, "model": False,
    }  # fmt: skip
    return Wandb(**{**values, **changes})


def tracker(run_dir: Path, *, resume: bool = False, **changes: Any) -> Tracker:
    names = ("0, 1", "2, 3")
    return Tracker(run_dir, CONFIG, page(**changes), run_id="abc123def456", resume=resume, experience_names=names)


def one_run(t: Tracker) -> None:
    t.log_experience(0, MATRIX[0], {}, MATRIX[:1], step=0)
    for i in (1, 2):
        for step in range(10 * i, 10 * i + 3):
            loss = math.nan if step == 21 else 1 / step
            t.log({"train/loss": loss, "train/task": 2.0}, step=step, experience=i, epoch=0, stage="main")
        t.log_experience(
            i, MATRIX[i], {"average_accuracy": 0.5, "forward_transfer": None}, MATRIX[: i + 1], step=10 * i + 2
        )
    t.finish("completed", {"average_accuracy": 0.6875, "forward_transfer": None, "steps": 22})


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Everything in the run's newest transaction log, as W&B's own tool reads it."""
    newest = max(
        (run_dir / "wandb").glob("offline-run-*-abc123def456/*.wandb"),
        key=lambda p: (p.parent.name, p.stat().st_mtime_ns),
    )
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(newest)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_offline_run_reads_back_as_it_was_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_run(tracker(tmp_path))
    assert capsys.readouterr().err == ""
    found = records(tmp_path)
    run = next(r["run"] for r in found if r["type"] == "run")
    assert (run["run_id"], run["project"], run["run_group"], run["tags"]) == (
        "abc123def456",
        "clplatform",
        "default",
        ["a", "split_digits"],
    )
    assert run["job_type"] == "replay+lwf"
    assert {k: v for k, v in run["config"]["update"].items() if k != "_wandb"} == CONFIG
    assert run["display_name"] == "replay+lwf split_digits seed 3"

    history = [r["history"]["item"] for r in found if r["type"] == "history"]
    curves = [h for h in history if "step" in h]
    assert [h["step"] for h in curves] == [0, 10, 11, 12, 12, 20, 21, 22, 22]
    assert [h["experience"] for h in curves] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert [h["train/loss"] for h in curves if "train/loss" in h] == [1 / 10, 1 / 11, 1 / 12, 1 / 20, "NaN", 1 / 22]
    last = curves[-1]
    assert (last["evaluation/average_accuracy"], last["evaluation/experience_2"]) == (0.5, 0.875)
    assert "evaluation/forward_transfer" not in last
    # The mirror holds what the record holds.
    rows = list(read(tmp_path / "metrics.jsonl"))
    assert [(r.step, r.experience, sorted(r.metrics)) for r in rows] == [
        (h["step"], h["experience"], sorted(k for k in h if "/" in k)) for h in curves
    ]

    metrics = [r["metric"] for r in found if r["type"] == "metric"]
    axes = {m.get("glob_name", m.get("name")): m.get("step_metric") for m in metrics}
    assert (axes["train/*"], axes["evaluation/*"]) == ("step", "experience")
    assert [h["matrix._type"] for h in history if "matrix._type" in h] == ["image-file"]
    table = next(h for h in history if "matrix_table._type" in h)
    assert (table["matrix_table.nrows"], table["matrix_table.ncols"]) == (3, 3)
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")
    content = json.loads(stored.read_text())
    assert content["columns"] == ["after", "0, 1", "2, 3"]
    assert content["data"] == [[i, *row] for i, row in enumerate(MATRIX)]
    (picture,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    summary: dict[str, Any] = {}
    for r in found:
        summary.update(r.get("summary", {}).get("update", {}))
    assert (summary["average_accuracy"], summary["status"], summary["steps"]) == (0.6875, "completed", 22)
    assert found[-1]["exit"]["exit_code"] == 0


def test_a_resumed_offline_run_goes_on_under_the_same_id_and_steps(tmp_path: Path) -> None:
    with tracker(tmp_path) as first:
        first.log({"train/loss": 1.0}, step=10, experience=1, epoch=0, stage="main")
    (before,) = (tmp_path / "wandb").glob("offline-run-*")
    time.sleep(1.1)  # the folder's name has seconds
    with tracker(tmp_path, resume=True) as second:
        second.log({"train/loss": 0.5}, step=20, experience=1, epoch=0, stage="main")
    (after,) = set((tmp_path / "wandb").glob("offline-run-*")) - {before}
    assert before.name.endswith("abc123def456") and after.name.endswith("abc123def456")
    assert [r["history"]["item"]["step"] for r in records(tmp_path) if r["type"] == "history"] == [20]


def test_an_unreachable_server_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    one_run(tracker(tmp_path, init_timeout=1.0))
    said = capsys.readouterr().err
    assert said.count("clplatform: W&B is not reachable") == 1 and "recording offline instead" in said
    assert "0000" not in said
    history = [r["history"]["item"] for r in records(tmp_path) if r["type"] == "history"]
    assert [h["step"] for h in history if "step" in h] == [0, 10, 11, 12, 12, 20, 21, 22, 22]
    assert [p.name for p in (tmp_path / "wandb").glob("run-*")] == []  # nothing left of the attempt
    assert len(list(read(tmp_path / "metrics.jsonl"))) == 9


def test_online_without_a_key_says_so_and_does_not_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_run(tracker(tmp_path, mode="online"))
    assert "set WANDB_API_KEY" in capsys.readouterr().err
    assert records(tmp_path)[-1]["type"] == "exit"


def test_a_place_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wandb").write_text("a file where the folder should be")
    one_run(tracker(tmp_path))
    assert capsys.readouterr().err.count("clplatform:") == 1
    assert len(list(read(tmp_path / "metrics.jsonl"))) == 9


def test_a_logger_that_raises_is_reported_once_and_the_record_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pytorch_lightning.loggers import WandbLogger

    calls = []

    def fail(self: WandbLogger, metrics: dict[str, Any], step: int | None = None) -> None:
        calls.append(metrics)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WandbLogger, "log_metrics", fail)
    one_run(tracker(tmp_path))
    said = capsys.readouterr().err
    assert said.count("clplatform:") == 1 and "No space left on device" in said and "tracking=local" in said
    assert len(calls) == 1
    assert len(list(read(tmp_path / "metrics.jsonl"))) == 9
    assert records(tmp_path)[-1]["type"] == "exit"  # and yet its file is closed


def test_an_exception_in_the_run_is_recorded_as_such(tmp_path: Path) -> None:
    def run() -> None:
        with tracker(tmp_path) as t:
            t.log({"train/loss": 1.0}, step=10, experience=1, epoch=0, stage="main")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    found = records(tmp_path)
    assert found[-1]["exit"]["exit_code"] == 1
    assert {"status": "failed"} in [r["summary"]["update"] for r in found if r["type"] == "summary"]


def test_off_leaves_only_the_record(tmp_path: Path) -> None:
    off: Any = False  # what YAML makes of a bare off
    for mode in ("off", off):
        assert [type(logger).__name__ for logger in tracker(tmp_path, mode=mode).loggers] == ["LocalLogger"]


def test_a_run_that_stopped_after_its_last_row_gets_its_matrix_and_summary(tmp_path: Path) -> None:
    names = ("0, 1", "2, 3")
    t = Tracker(tmp_path, CONFIG, page(), run_id="abc123def456", resume=True, experience_names=names, matrix=MATRIX)
    t.finish("completed", {"average_accuracy": 0.6875})
    found = records(tmp_path)
    assert any("matrix_table._type" in r["history"]["item"] for r in found if r["type"] == "history")
    assert {"average_accuracy": 0.6875, "status": "completed"} in [
        r["summary"]["update"] for r in found if r["type"] == "summary"
    ]


def test_a_resumed_run_that_stops_before_its_first_row_leaves_nothing(tmp_path: Path) -> None:
    t = Tracker(tmp_path, CONFIG, page(), run_id="abc123def456", resume=True, matrix=MATRIX)
    t.finish("stopped", {})
    assert list(tmp_path.iterdir()) == []


def test_run_name() -> None:
    assert run_name(CONFIG) == "replay+lwf split_digits seed 3"


def test_mode_follows_environment_and_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_mode("auto") == "offline"
    path = tmp_path / "netrc"
    path.write_text("machine api.wandb.ai login user password secret\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    assert chosen_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert chosen_mode("auto") == "offline"  # the key is for another server
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert chosen_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert chosen_mode("auto") == "offline" and chosen_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert chosen_mode("auto") == "off"
