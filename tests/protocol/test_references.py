"""`references=true`: derived from the run, made once, and what the metrics make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import TINY, call

from clplatform.metric.matrix import forgetting_ratio, intransigence, transfer
from clplatform.protocol.references import derive


def test_a_sweep_shares_its_references_and_its_metrics_refer_to_them(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["-m", *TINY, "references=true", "strategy=finetuning,replay", "hydra.sweep.dir=out"]
    done = call(capsys, *sweep)
    assert done.code == 0, done.err
    made = {p.parent.name: json.loads(p.read_text()) for p in Path("out/references").glob("*/results.json")}
    assert sorted(r["strategy"][0] for r in made.values()) == ["independent", "joint"]
    assert [r["stream"]["scenario"] for r in made.values() if r["strategy"] == ["independent"]] == ["task_incremental"]
    assert len([*Path("out/references").glob("untrained-*.json")]) == 1
    matrices = {r["strategy"][0]: r["matrix"] for r in made.values()}
    runs = [json.loads(p.read_text()) for p in Path("out").glob("*/results.json")]
    assert len(runs) == 2
    for run in runs:
        row = run["references"]["untrained"]
        assert len(row) == 2
        assert all(0 <= v <= 1 for v in row)
        metrics = run["metrics"]
        assert metrics["intransigence"] == intransigence(run["matrix"], matrices["joint"])
        assert metrics["transfer"] == transfer(run["matrix"], matrices["independent"])
        assert metrics["forgetting_ratio"] == forgetting_ratio(run["matrix"], matrices["joint"], row)
        assert None not in (metrics["intransigence"], metrics["transfer"], metrics["forgetting_ratio"])
    comparison = Path("out/comparison.md").read_text()
    assert "2 completed" in comparison  # the references are not among what is compared
    assert "Forgetting ratio" in comparison
    times = {p: p.stat().st_mtime_ns for p in Path("out/references").rglob("results.json")}
    assert call(capsys, *sweep[:-2], "strategy=ewc", sweep[-1]).code == 0
    assert times == {p: p.stat().st_mtime_ns for p in Path("out/references").rglob("results.json")}


def test_a_joint_run_of_the_sweep_is_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "-m", *TINY, "references=true", "strategy=joint,finetuning", "hydra.sweep.dir=out")
    assert done.code == 0, done.err
    strategies = {json.loads(p.read_text())["strategy"][0] for p in Path("out/references").glob("*/results.json")}
    assert strategies == {"independent"}


def test_a_stream_without_a_form_with_task_ids_has_no_independent_reference() -> None:
    config = {"strategy": {"finetuning": {}}, "stream": {"_target_": "a benchmark"}, "references": True}
    assert derive(config, "independent") is None
    joint = derive(config, "joint")
    assert joint is not None
    assert [*joint["strategy"]] == ["joint"]
    assert not joint["references"]
    assert config["references"]
