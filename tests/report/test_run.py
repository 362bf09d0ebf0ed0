"""Reading run directories: complete, incomplete, broken and absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clplatform.report.run import find_runs, load_run, number, read_lines
from clplatform.types import ClplatformError

MakeRun = Callable[..., Path]  # the fixture `make_run`


def test_a_complete_run(make_run: MakeRun):
    run = load_run(make_run())
    assert (run.status, run.strategy, run.n_learned, run.n_experiences) == ("completed", "replay", 5, 5)
    assert run.metrics["average_accuracy"] == pytest.approx(sum(filter(None, run.matrix[-1])) / 5)
    assert len(run.log) == 450
    assert run.config["optimizer"]["lr"] == 0.001
    assert run.problems == []


def test_a_stored_intransigence_is_kept_and_the_rest_computed(make_run: MakeRun):
    folder = make_run(change=lambda r: r.update(metrics={"intransigence": 0.25, "average_accuracy": 0.123}))
    metrics = load_run(folder).metrics
    assert metrics["intransigence"] == 0.25
    assert metrics["average_accuracy"] != 0.123


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results.json"),
        ('{"matrix": [[', "cannot be read"),
        ("[]", "not the record of a clplatform run"),
        ("{}", "not the record"),
    ],
)
def test_unreadable_results_are_refused(tmp_path: Path, content: str | None, message: str):
    folder = tmp_path / "run"
    folder.mkdir()
    if content is not None:
        (folder / "results.json").write_text(content)
    with pytest.raises(ClplatformError, match=message):
        load_run(folder)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ClplatformError, match="nowhere: there is no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ClplatformError, match="no such folder"):
        find_runs(tmp_path / "nowhere")


def test_what_else_is_missing_is_said(make_run: MakeRun):
    folder = make_run()
    for name in ("metrics.jsonl", "environment.json", "config.yaml"):
        (folder / name).unlink()
    run = load_run(folder)
    assert run.log == []
    assert run.config == {}
    assert [p.split(" ")[0] for p in run.problems] == ["environment.json", "config.yaml", "metrics.jsonl"]


def test_hydras_own_record_stands_in_for_the_resolved_configuration(make_run: MakeRun):
    folder = make_run()
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("seed: 7\n")
    assert load_run(folder).config["seed"] == 0
    (folder / "config.yaml").unlink()
    run = load_run(folder)
    assert run.config == {"seed": 7}
    assert len(run.problems) == 1


def test_cells_that_are_no_numbers_are_empty(tmp_path: Path):
    (tmp_path / "results.json").write_text('{"matrix": [[null, null], [NaN, null], [0.5, Infinity]]}')
    assert load_run(tmp_path).matrix == [[None, None], [None, None], [0.5, None]]


def test_broken_parts_are_said(make_run: MakeRun):
    folder = make_run(change=lambda r: r.update(matrix=[[None, None], [0.5]]))
    (folder / "environment.json").write_text("{")
    (folder / "config.yaml").write_text("a: [1")
    run = load_run(folder)
    assert run.matrix == []
    assert run.config == {}
    assert len(run.problems) == 3
    assert "rows of different length" in run.problems[1]


def test_a_killed_run_leaves_half_a_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n{"ste')
    rows, broken = read_lines(path)
    assert rows == [{"step": 1}, {"step": 2}]
    assert broken == 1  # the half line at the end is no loss
    assert read_lines(tmp_path / "absent") == (None, 0)


def test_runs_are_found_below_a_folder(make_run: MakeRun, tmp_path: Path):
    a, b = make_run("sweep/a"), make_run("sweep/deep/b")
    (a / "model").mkdir()
    (a / "model" / "results.json").write_text("{}")  # inside a run: not another one
    (tmp_path / "sweep" / "stopped" / ".hydra").mkdir(parents=True)
    assert find_runs(tmp_path / "sweep") == ([a, b], [tmp_path / "sweep" / "stopped"])
    assert find_runs(a / "results.json") == ([a], [])


@pytest.mark.parametrize(("value", "expected"), [(1, 1.0), (0.5, 0.5), ("NaN", None), (True, None), (None, None)])
def test_numbers(value: object, expected: float | None):
    assert number(value) == expected
    assert number(float("inf")) is None


def test_partial_results_without_most_keys(tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps({"matrix": [[None, None], [0.75, None]]}))
    run = load_run(tmp_path)
    assert run.names == ["experience 1", "experience 2"]
    assert run.status == "unknown"
    assert run.metrics["average_accuracy"] == 0.75
