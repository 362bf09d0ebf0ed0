"""Who is compared with whom, run by run, and what is said of those that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from clplatform.report import report
from clplatform.report.comparison_paired import paired_parts, paired_tables
from clplatform.report.document import Points, Table, Text
from clplatform.report.grouping import Setting, settings, unequal
from clplatform.report.pairing import comparisons, gaps, match, references
from clplatform.report.run import load_run

MakeRun = Callable[..., Path]  # the fixture `make_run`


def setting_of(folder: Path) -> Setting:
    """The one setting of all runs in a folder, its groups sorted by name."""
    found = settings([load_run(path.parent) for path in sorted(folder.glob("*/results.json"))])
    assert len(found) == 1
    found[0].groups.sort(key=lambda group: group.label)
    return found[0]


def average(folder: Path) -> float:
    row = json.loads((folder / "results.json").read_text())["matrix"][-1]
    return sum(row) / len(row)


@pytest.fixture
def two(make_run: MakeRun, tmp_path: Path) -> Setting:
    """ewc with seeds 0 … 5, replay with seeds 5 … 1 and 7, written in another order."""
    for seed in range(6):
        make_run(f"ewc-{seed}", strategy="ewc", seed=seed, keep=0.8)
    for seed in (5, 4, 3, 2, 1, 7):
        make_run(f"a-replay-{9 - seed}", strategy="replay", seed=seed, keep=0.82)
    return setting_of(tmp_path)


def test_pairs_have_the_same_seed_whatever_the_order_of_runs(two: Setting, tmp_path: Path):
    ewc, replay = two.groups
    pairs, other_data = match(replay, ewc, "average_accuracy")
    expected = [(average(tmp_path / f"a-replay-{9 - s}"), average(tmp_path / f"ewc-{s}")) for s in range(1, 6)]
    assert pairs == [pytest.approx(pair) for pair in expected]
    assert not other_data
    result = comparisons(two, ewc)[0].result
    assert result is not None
    assert result.p_t == pytest.approx(stats.ttest_rel(*zip(*expected, strict=True)).pvalue)


def test_runs_without_a_partner_are_named(two: Setting):
    assert gaps(two) == ["only ewc: seed 0", "only replay: seed 7"]
    points = [part for part in paired_parts(two) if isinstance(part, Points)]
    assert list(points[0].items) == gaps(two)


def test_another_class_order_is_no_pair(make_run: MakeRun, tmp_path: Path):
    def order(seed: int) -> Callable[[dict[str, Any]], None]:
        return lambda results: results["stream"].update(seed=seed)

    make_run("a", strategy="ewc", seed=0, change=order(1))
    make_run("b", strategy="replay", seed=0, change=order(2))
    setting = setting_of(tmp_path)
    assert comparisons(setting, setting.groups[0])[0].result is None
    assert gaps(setting) == ["only ewc: seed 0, class order 1", "only replay: seed 0, class order 2"]
    text = next(part.text for part in paired_parts(setting) if isinstance(part, Text))
    assert "there is no pair to compare" in text


def test_other_test_data_are_no_pair_and_are_named(make_run: MakeRun, tmp_path: Path):
    make_run("a", strategy="ewc", seed=0)
    make_run("b", strategy="replay", seed=0, change=lambda r: r["stream"]["samples"].update(test=[36] * 5))
    make_run("c", strategy="si", seed=0, change=lambda r: r["stream"]["class_names"].reverse())
    setting = setting_of(tmp_path)
    ewc, replay, si = setting.groups
    assert match(replay, ewc, "average_accuracy") == ([], ["seed 0"])
    assert match(si, ewc, "average_accuracy") == ([], ["seed 0"])
    remarks = [item for part in paired_parts(setting) if isinstance(part, Points) for item in part.items]
    assert "ewc and replay, seed 0: other classes, or another number of test samples" in remarks


def test_budgets_that_differ_are_named(make_run: MakeRun, tmp_path: Path):
    def config(epochs: int, **more: Any) -> dict[str, Any]:
        return {"trainer.max_epochs": epochs, "stream.epochs": 7 + epochs, "optimizer.lr": 0.1 / epochs, **more}

    make_run("a", strategy="er_ace", settings=config(5, **{"strategy.er_ace.capacity": 500}))
    make_run("b", strategy="ewc", settings=config(5))
    make_run("c", strategy="replay", settings=config(10, **{"strategy.replay.capacity": 200}))
    setting = setting_of(tmp_path)
    er_ace, ewc, replay = setting.groups
    assert unequal(er_ace, ewc) == []  # one of them keeps no samples
    assert unequal(er_ace, replay) == ["trainer.max_epochs 5 / 10", "memory 500 / 200"]
    table = next(t for t in paired_tables(setting) if "with er_ace" in t.caption)
    assert table.header[-1] == "unequal"
    assert {row[0]: row[-1] for row in table.rows} == {
        "ewc": "–", "replay": "trainer.max_epochs 10 / 5; memory 200 / 500",
    }  # fmt: skip
    (tmp_path / "c" / "config.yaml").unlink()
    assert unequal(*setting_of(tmp_path).groups[:3:2]) == []  # not recorded


def test_the_references_are_the_best_finetuning_and_replay(make_run: MakeRun, tmp_path: Path):
    for name, keep in (("joint", 1.0), ("ewc", 0.9), ("replay", 0.8), ("finetuning", 0.3)):
        make_run(f"sweep/{name}", strategy=name, keep=keep)
    markdown = report([tmp_path / "sweep"]).with_suffix(".md").read_text()
    assert "with ewc, the best here (bounds aside)**" in markdown
    assert "with finetuning**" in markdown
    assert "with replay**" in markdown
    assert "with joint" not in markdown


def test_the_other_way_round_of_two_groups_says_nothing_new(two: Setting):
    assert references(two) == two.groups[:1]


def test_p_values_are_corrected_over_the_table(make_run: MakeRun, tmp_path: Path):
    for seed in range(6):
        for name, keep in (("ewc", 0.5), ("replay", 0.95), ("si", 0.7)):
            make_run(f"{name}-{seed}", strategy=name, seed=seed, keep=keep)
    setting = setting_of(tmp_path)
    found = comparisons(setting, setting.groups[1])
    assert [c.p_exact for c in found] == [2 * 2 / 2**6] * 2
    text = next(part.text for part in paired_parts(setting) if isinstance(part, Text))
    assert "with 6 pairs its p cannot be below 0.062 after the correction over 2 comparisons" in text
    assert "at least 7 pairs" in text


def test_enough_pairs_need_no_warning(make_run: MakeRun, tmp_path: Path):
    for seed in range(6):
        make_run(f"ewc-{seed}", strategy="ewc", seed=seed, keep=0.5)
        make_run(f"replay-{seed}", strategy="replay", seed=seed, keep=0.95)
    parts = paired_parts(setting_of(tmp_path))
    assert not any("Too few" in part.text for part in parts if isinstance(part, Text))
    table = next(part for part in parts if isinstance(part, Table))
    assert table.rows[0][:2] == ["replay", "6"]
    assert table.rows[0][4] == "0.031 *"
    assert table.rows[0][7] == "100 %"


def test_one_pair_is_no_test(make_run: MakeRun, tmp_path: Path):
    make_run("ewc", strategy="ewc")
    make_run("replay", strategy="replay")
    setting = setting_of(tmp_path)
    [comparison] = comparisons(setting, setting.groups[0])
    assert comparison.result is not None
    assert comparison.p_exact is comparison.p_t is None
    assert list(paired_tables(setting)[0].header) == ["strategy", "pairs", "difference", "better in"]
    assert any("A single pair" in part.text for part in paired_parts(setting) if isinstance(part, Text))


def test_where_lower_is_better_the_lower_wins(make_run: MakeRun, tmp_path: Path):
    for seed in range(3):
        make_run(f"ewc-{seed}", strategy="ewc", seed=seed, keep=0.5, metric="perplexity")
        make_run(f"replay-{seed}", strategy="replay", seed=seed, keep=0.95, metric="perplexity")
    markdown = report([tmp_path]).with_suffix(".md").read_text()
    assert "with replay, the best here**" in markdown
    line = next(x for x in markdown.splitlines() if x.startswith("| ewc | 3 | +"))
    assert line.endswith("| 0 % |")  # better in no pair
