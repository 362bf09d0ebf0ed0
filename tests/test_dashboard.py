"""`clplatform dashboard`: what would be sent to W&B, read back as JSON; and what is missing is said in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest
from command import call, refused

from clplatform.metric.matrix import METRICS
from clplatform.report.details import COST as COSTS

there = importlib.util.find_spec("wandb_workspaces") is not None
installed = pytest.mark.skipif(not there, reason="clplatform[dashboard] is not installed")


@pytest.fixture
def spec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def send(*_: Any, **__: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.setattr("requests.sessions.Session.request", send)
    done = call(capsys, "dashboard", "mine", "--entity", "us", "--dry-run")
    assert done.code == 0, done.err
    return json.loads(done.out)


def panels(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Title → panel, of the workspace."""
    sections = spec["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    return {p["config"].get("chartTitle", p["viewType"]): p for s in sections for p in s["panels"]}


@installed
@pytest.mark.filterwarnings("ignore")
def test_the_workspace_has_a_panel_for_each_question(spec: dict[str, Any]) -> None:
    found = spec["workspace"]
    assert (found["entity"], found["project"]) == ("us", "mine")
    sections = found["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == ["Over experiences", "Accuracy matrix", "At the end", "Training", "Cost"]
    assert [s["isOpen"] for s in sections] == [True, True, False, False, False]
    assert len({p["__id__"] for s in sections for p in s["panels"]}) == sum(len(s["panels"]) for s in sections)
    each, curve = panels(spec), sections[0]["panels"][0]
    assert curve["viewType"] == "Run History Line Plot"
    assert curve["config"]["xAxis"] == "experience"
    assert curve["config"]["metrics"] == ["evaluation/average_accuracy"]
    assert (curve["config"]["groupBy"], curve["config"]["groupAgg"], curve["config"]["groupArea"]) == (
        "jobType", "mean", "stddev",
    )  # fmt: skip
    assert each["Heat map of each run"]["config"]["mediaKeys"] == ["matrix"]
    assert "matrix_table" in json.dumps(each["Weave"])
    assert each["Loss"]["config"]["xAxis"] == "step"
    assert each["Loss"]["config"]["metrics"] == ["train/loss"]
    assert each["Loss terms"]["config"]["metricRegex"] == "train/(?!lr$|loss$).*"


@installed
@pytest.mark.filterwarnings("ignore")
def test_runs_are_grouped_by_strategy_and_stream(spec: dict[str, Any]) -> None:
    (runs,) = spec["workspace"]["spec"]["section"]["runSets"]
    assert [(g["section"], g["name"]) for g in runs["grouping"]] == [
        ("run", "jobType"),
        ("config", "stream.value.name"),
    ]
    grids = [block for block in spec["report"] if block["type"] == "panel-grid"]
    assert len(grids) == 5
    for grid in grids:
        (shown,) = grid["metadata"]["runSets"]
        assert [(g["section"], g["name"]) for g in shown["grouping"]] == [
            ("run", "jobType"),
            ("config", "stream.value.name"),
        ]


@installed
@pytest.mark.filterwarnings("ignore")
def test_every_name_is_one_that_runs_log(spec: dict[str, Any]) -> None:
    names = {name for p in panels(spec).values() for name in p["config"].get("metrics") or []}
    known = {m.name for m in METRICS} | set(COSTS)
    finals = {n for n in names if "/" not in n}
    assert len(finals) > 10
    assert finals <= known
    assert {n.removeprefix("evaluation/") for n in names if n.startswith("evaluation/")} <= {m.name for m in METRICS}


@installed
@pytest.mark.filterwarnings("ignore")
def test_without_a_login_nothing_is_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = refused(capsys, "dashboard", "mine")
    assert said == (
        "dashboard: there is no login: set WANDB_API_KEY, or run `wandb login` once; --dry-run shows what would be made"
    )


@installed
@pytest.mark.filterwarnings("ignore")
def test_a_server_that_does_not_answer_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    done = call(capsys, "dashboard", "mine", "--entity", "us")
    assert done.code == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("clplatform: ")]
    assert line.startswith("clplatform: dashboard: W&B has refused (")
    assert "0000" not in done.err


def test_without_the_package_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for more in ([], ["--dry-run"]):
        said = refused(capsys, "dashboard", "mine", *more)
        assert "is not installed; it comes with clplatform[dashboard] (pip install 'clplatform[dashboard]')" in said
