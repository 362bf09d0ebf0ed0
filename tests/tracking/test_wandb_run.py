"""A whole run that is recorded in W&B offline: read back, and compared with its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import TINY

from clplatform.files import read_json
from clplatform.tracking.local import read

SETTINGS = [*TINY[:-1], "tracking=wandb", "tracking.every_n_steps=1", "strategy=[replay,lwf]", "hydra.run.dir=out"]


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clplatform.cli", *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finished(*arguments: str) -> str:
    process = start(*arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def records(file: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def files() -> list[Path]:
    return sorted(Path("out/wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns)


def test_what_is_read_back_is_what_the_results_say() -> None:
    err = finished(*SETTINGS, "tracking.model=true", "budget.steps=3")
    assert "W&B" not in err
    results, (file,) = read_json(Path("out/results.json")), files()
    found = records(file)
    run = next(r["run"] for r in found if r["type"] == "run")
    assert (run["run_id"], run["job_type"], run["run_group"]) == (results["run_id"], "replay+lwf", "default")
    assert run["tags"] == ["split_digits", "class_incremental", "mlp", "budget.steps=3"]
    assert run["display_name"] == "replay+lwf split_digits seed 0"
    assert run["config"]["update"]["budget"]["steps"] == 3

    summary: dict[str, Any] = {}
    for r in found:
        summary.update(r.get("summary", {}).get("update", {}))
    for name, value in {**results["metrics"], **results["cost"]}.items():
        assert summary.get(name) == (None if value is None else pytest.approx(value, rel=1e-9)), name
    assert summary["status"] == "completed"

    history = [r["history"]["item"] for r in found if r["type"] == "history"]
    measured = {h["experience"]: h for h in history if any(k.startswith("evaluation/experience_") for k in h)}
    for i, row in enumerate(results["matrix"]):
        logged = [measured[i].get(f"evaluation/experience_{j + 1}") for j in range(len(row))]
        assert logged == [pytest.approx(v) if v is not None else None for v in row]
    assert measured[2]["evaluation/average_accuracy"] == pytest.approx(results["metrics"]["average_accuracy"])
    rows = list(read(Path("out/metrics.jsonl")))
    losses = [r.metrics["train/loss"] for r in rows if "train/loss" in r.metrics]
    assert [h["train/loss"] for h in history if "train/loss" in h] == losses
    assert len(losses) == 6
    assert any("train/lwf" in h for h in history)

    table = json.loads(next(file.parent.glob("files/media/table/*.json")).read_text())
    assert [row[1:] for row in table["data"]] == results["matrix"]
    metrics = [r["metric"] for r in found if r["type"] == "metric"]
    axes = {m.get("glob_name", m.get("name")): m.get("step_metric") for m in metrics}
    assert [axes[n] for n in ("train/*", "validation/*", "evaluation/*", "matrix")] == ["step"] * 2 + ["experience"] * 2

    artifacts = [str(r) for r in found if "artifact" in str(r["type"])]
    assert any(f"report-{results['run_id']}" in a and "report.html" in a for a in artifacts)
    assert any(f"model-{results['run_id']}" in a for a in artifacts)
    assert "<html" in Path("out/wandb/report/report.html").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_under_its_id_and_loses_nothing() -> None:
    whole = start(*SETTINGS[:-1], "hydra.run.dir=whole", "budget.steps=400")
    whole.communicate(timeout=300)
    process = start(*SETTINGS, "budget.steps=400", "checkpoint.every_n_batches=20")
    end = time.monotonic() + 200
    while not Path("out/checkpoints/step.ckpt").exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Path("out/checkpoints/step.ckpt").exists()
    assert read_json(Path("out/results.json"))["status"] == "running"
    time.sleep(1.1)  # W&B names folders by the second
    finished("resume", "out")
    results, other = read_json(Path("out/results.json")), read_json(Path("whole/results.json"))
    assert results["matrix"] == other["matrix"]
    assert [r.metrics for r in read(Path("out/metrics.jsonl"))] == [
        r.metrics for r in read(Path("whole/metrics.jsonl"))
    ]
    found = records(files()[-1])
    assert {r["run"]["run_id"] for r in found if r["type"] == "run"} == {results["run_id"]}
    history = [r["history"]["item"] for r in found if r["type"] == "history"]
    assert history[-1]["experience"] == 2
    assert max(h["step"] for h in history if "step" in h) == 800


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_of_the_mirror_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's folder cannot be written to: the run and its record are complete."""
    Path("out").mkdir()
    Path("out/wandb").symlink_to("/dev/full")
    err = finished(*SETTINGS)
    assert err.count("clplatform: W&B") == 1
    results = read_json(Path("out/results.json"))
    assert results["status"] == "completed"
    assert list(read(Path("out/metrics.jsonl")))[-1].metrics["evaluation/average_accuracy"] == pytest.approx(
        results["metrics"]["average_accuracy"]
    )
