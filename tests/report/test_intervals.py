"""Confidence intervals and interquartile means of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clplatform.report import report
from clplatform.report.grouping import Setting, settings
from clplatform.report.intervals import intervals
from clplatform.report.run import load_run

MakeRun = Callable[..., Path]  # the fixture `make_run`


@pytest.fixture
def setting(make_run: MakeRun, tmp_path: Path) -> Setting:
    for seed in range(4):
        make_run(f"replay-{seed}", seed=seed)
    make_run("ewc", strategy="ewc")
    return settings([load_run(path.parent) for path in sorted(tmp_path.glob("*/results.json"))])[0]


def test_the_intervals_are_students(setting: Setting, tmp_path: Path):
    table = intervals(setting)
    assert table is not None
    rows = [json.loads((tmp_path / f"replay-{s}" / "results.json").read_text())["matrix"][-1] for s in range(4)]
    values = 100 * np.mean(rows, axis=1)
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    row = next(row for row in table.rows if row[0] == "replay")
    assert row[1:4] == ["4", f"{values.mean():.1f}", f"[{low:.1f}, {high:.1f}]"]
    assert row[4].startswith("+")  # forgetting, in percentage points
    assert row[6] == f"{np.sort(values)[1:3].mean():.1f}"  # the interquartile mean of four: the middle two


def test_one_run_has_neither(setting: Setting):
    table = intervals(setting)
    assert table is not None
    row = next(row for row in table.rows if row[0] == "ewc")
    assert [row[3], row[5], row[6], row[7]] == ["–"] * 4
    setting.groups = [group for group in setting.groups if group.label == "ewc"]
    assert intervals(setting) is None


def test_fewer_than_four_runs_have_no_interquartile_mean(setting: Setting):
    for group in setting.groups:
        group.runs = group.runs[:3]
    table = intervals(setting)
    assert table is not None
    assert "IQM" not in table.header


def test_curves_have_bands_from_three_seeds_on(make_run: MakeRun, tmp_path: Path):
    for seed in range(2):
        make_run(f"sweep/replay-{seed}", seed=seed)
    text = report([tmp_path / "sweep"]).read_text()
    assert "FillBetween" not in text
    assert "thin lines single seeds" in text
    assert "areas" not in text
    make_run("sweep/replay-2", seed=2)
    text = report([tmp_path / "sweep"]).read_text()
    assert text.count("FillBetween") == 1
    assert "areas their 95 % confidence intervals" in text
