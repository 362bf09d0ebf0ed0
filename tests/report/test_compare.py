"""Comparing runs: who is averaged with whom, and who never is."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clplatform.report import report
from clplatform.report.grouping import settings
from clplatform.report.run import load_run
from clplatform.types import ClplatformError

MakeRun = Callable[..., Path]  # the fixture `make_run`


def table(path: Path) -> list[dict[str, str]]:
    with path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def row(markdown: str, start: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {start} | "))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.fixture
def sweep(make_run: MakeRun, tmp_path: Path) -> Path:
    for seed in range(3):
        make_run(f"sweep/replay-{seed}", seed=seed, keep=0.95)
        make_run(f"sweep/finetuning-{seed}", strategy="finetuning", seed=seed, keep=0.4)
    return tmp_path / "sweep"


def averages(folder: Path, pattern: str) -> list[float]:
    found = [json.loads(p.read_text())["matrix"][-1] for p in sorted(folder.glob(f"{pattern}/results.json"))]
    return [sum(values) / len(values) for values in found]


def test_paths_are_named_by_what_sets_them_apart(make_run: MakeRun):
    runs = []
    for i in (1, 2):
        run = load_run(make_run(f"after-{i}"))
        run.config.setdefault("backbone", {})["pretrained"] = f"/somewhere/far/away/models/after_{i}"
        runs.append(run)
    (found,) = settings(runs)
    assert {g.label for g in found.groups} == {f"replay (backbone.pretrained=after_{i})" for i in (1, 2)}


def test_long_fractions_have_as_many_digits_as_it_takes(make_run: MakeRun):
    def labels(*values: float) -> set[str]:
        runs = []
        for i, value in enumerate(values):
            run = load_run(make_run(f"run-{i}"))
            run.config["strategy"] = {"replay": {"capacity": value}}
            runs.append(run)
        return {g.own["capacity"] for setting in settings(runs) for g in setting.groups}

    assert labels(2133.9104561858435, 308.97594868, 5.0) == {"2134", "309", "5"}
    assert labels(308.97594868, 308.97584868) == {"308.9759", "308.9758"}
    assert labels(29127.33543098181, 3.0) == {"29130", "3"}
    assert labels(0.25, 0.125) == {"0.25", "0.125"}


def test_trials_of_a_search_are_told_from_results(make_run: MakeRun, tmp_path: Path):
    for i, keep in enumerate((0.9, 0.5)):
        make_run(f"sweep/trial-{i}", keep=keep, settings={"strategy": {"replay": {"capacity": 100 * (i + 1)}}})
    plain = report([tmp_path / "sweep"]).with_suffix(".md").read_text()
    assert "trials" not in plain
    (tmp_path / "sweep" / "optimization_results.yaml").write_text("name: optuna\n")
    text = report([tmp_path / "sweep"]).with_suffix(".md").read_text()
    assert "These runs are the trials of a search (replay 2), which chose by the validation split" in text
    table = text[text.index("The trials, the best on validation data first") :].splitlines()
    best = averages(tmp_path / "sweep", "trial-0")[0]  # the validation matrix of these runs is that of the test
    assert table[4] == f"| replay (capacity=100) | {100 * best:.1f} % | {100 * best:.1f} % |"


def test_groups_of_seeds(sweep: Path):
    path = report([sweep])
    assert path == sweep / "comparison.html"
    markdown = path.with_suffix(".md").read_text()
    values = averages(sweep, "replay-*")
    expected = f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
    line = next(x for x in markdown.splitlines() if x.startswith("| replay | 3 |"))
    assert expected in line
    assert markdown.index("| replay | 3 |") < markdown.index("| finetuning | 3 |")  # best first
    html = path.read_text()
    assert html.count("<svg") == 3  # curves, and a heat map for each group
    assert "Left out" not in html
    assert "fractions" not in html
    assert len(table(path)) == 6


def test_the_csv_holds_fractions_in_full_precision(sweep: Path):
    lines = {line["run"]: line for line in table(report([sweep]))}
    assert float(lines["replay-1"]["average_accuracy"]) == pytest.approx(averages(sweep, "replay-1")[0], abs=1e-15)
    assert lines["replay-1"]["averaged"] == "True"
    assert lines["replay-1"]["forward_transfer"] == ""


def test_failed_and_incomplete_runs_are_listed_and_never_averaged(sweep: Path, make_run: MakeRun):
    before = [line for line in report([sweep]).with_suffix(".md").read_text().splitlines() if "| replay | 3 |" in line]
    make_run("sweep/failed", status="failed", learned=2, seed=7)
    make_run("sweep/running", status="running", learned=4, seed=8)
    make_run("sweep/short", status="completed", learned=4, seed=9)  # says completed, but a row is missing
    (sweep / "broken").mkdir()
    (sweep / "broken" / "results.json").write_text("{")
    (sweep / "stopped" / ".hydra").mkdir(parents=True)
    path = report([sweep])
    markdown = path.with_suffix(".md").read_text()
    assert [line for line in markdown.splitlines() if "| replay | 3 |" in line] == before
    assert row(markdown, "failed")[1:4] == ["failed", "replay", "2 of 5"]
    assert "RuntimeError" in row(markdown, "failed")[4]
    assert row(markdown, "running")[1] == "running"
    assert row(markdown, "short")[1] == "incomplete"
    assert row(markdown, "broken")[1] == row(markdown, "stopped")[1] == "unreadable"
    assert "not averaged in: 5 runs" in markdown
    averaged = {line["run"]: line["averaged"] for line in table(path)}
    assert len(averaged) == 11
    assert sum(value == "True" for value in averaged.values()) == 6


def test_only_failed_runs(make_run: MakeRun, tmp_path: Path):
    make_run("sweep/a", status="failed", learned=1)
    path = report([tmp_path / "sweep"])
    assert "a | failed" in path.with_suffix(".md").read_text()


def test_hyper_parameters_are_not_averaged_over(sweep: Path, make_run: MakeRun):
    for seed in range(2):
        make_run(f"sweep/strong-{seed}", seed=seed, settings={"strategy.replay.strength": 9.0})
    markdown = report([sweep]).with_suffix(".md").read_text()
    assert "| replay (strength=1.0) | 3 |" in markdown
    assert "| replay (strength=9.0) | 2 |" in markdown
    assert "| finetuning | 3 |" in markdown


def test_parameters_trained_stand_beside_the_metrics_where_they_differ(sweep: Path, make_run: MakeRun):
    assert "parameters trained |" not in report([sweep]).with_suffix(".md").read_text().partition("**What it costs")[0]
    make_run("sweep/few", strategy="l2p", change=lambda results: results["cost"].update(trained_parameters=1234))
    averages = report([sweep]).with_suffix(".md").read_text().partition("**What it costs")[0]
    assert "| parameters trained | seconds |" in averages
    assert "| 1,234 |" in averages and "| 104,512 |" in averages


def test_blurry_streams_are_streams_of_their_own(make_run: MakeRun, tmp_path: Path) -> None:
    def share(value: float | None) -> Callable[[dict[str, Any]], None]:
        return lambda results: results["stream"].update(blurry=value)

    make_run("before")
    for name, value in (("clear", None), ("hidden", 0.0), ("blurry", 0.1)):
        make_run(name, change=share(value), settings={"stream.blurry": value})
    found = settings([load_run(tmp_path / name) for name in ("before", "clear", "hidden", "blurry")])
    titles = [setting.title for setting in found]
    assert titles == [
        "split_digits, class-incremental, 5 experiences, vit_tiny",
        "split_digits, class-incremental without boundaries (0 % blurry), 5 experiences, vit_tiny",
        "split_digits, class-incremental without boundaries (10 % blurry), 5 experiences, vit_tiny",
    ]
    assert [len(setting.groups) for setting in found] == [1, 1, 1]
    page = report([tmp_path / "blurry"]).read_text()
    assert "class-incremental continual learning without boundaries (10 % blurry), 5 experiences" in page


def test_settings_that_differ_between_strategies_are_said(make_run: MakeRun, tmp_path: Path):
    make_run("a", strategy="replay", settings={"optimizer.lr": 0.1})
    make_run("b", strategy="ewc")
    found = settings([load_run(tmp_path / "a"), load_run(tmp_path / "b")])
    assert len(found) == 1
    assert found[0].differences == {"optimizer.lr": {"replay": "0.1", "ewc": "0.001"}}


def test_tunings_are_told_apart(make_run: MakeRun, tmp_path: Path):
    def tuned(name: str, tuning: str | None, **options: Any) -> None:
        page = (
            {} if tuning is None else {"tuning._target_": f"clplatform.tuning.{tuning}.It", **options.pop("page", {})}
        )
        make_run(
            name, settings=page, change=lambda r: r["backbone"].update({"tuning": tuning} if tuning else {}), **options
        )

    tuned("old", None)  # of before there was a choice
    tuned("full", "full", seed=1)
    tuned("small", "lora", page={"tuning.rank": 2, "optimizer.lr": 0.1})
    tuned("large", "lora", page={"tuning.rank": 8, "optimizer.lr": 0.1})
    tuned("biases", "bitfit")
    found = settings([load_run(tmp_path / name) for name in ("old", "full", "small", "large", "biases")])
    names = {group.label: len(group.runs) for group in found[0].groups}
    assert names == {
        "replay": 2, "replay, lora (tuning.rank=2)": 1, "replay, lora (tuning.rank=8)": 1, "replay, bitfit": 1,
    }  # fmt: skip
    assert found[0].differences.keys() == {"optimizer.lr"}


def test_seeds_and_places_make_no_new_group(make_run: MakeRun, tmp_path: Path):
    make_run("a", seed=0, settings={"stream.seed": 1, "stream.data_dir": "/x", "tracking.mode": "off"})
    make_run("b", seed=1, settings={"stream.seed": 2, "name": "other", "threads": 2})
    found = settings([load_run(tmp_path / "a"), load_run(tmp_path / "b")])
    assert [len(group.runs) for group in found[0].groups] == [2]


def test_a_run_of_before_there_was_a_setting_is_one_where_it_is_off(make_run: MakeRun, tmp_path: Path):
    off = {"bucket_by_length": False, "evaluate_every": None, "keep_models": False, "prompting": None}
    make_run("a", seed=0)
    make_run("b", seed=1, settings={**off, "stream.augment": None})
    make_run("c", seed=2, settings={"keep_models": True, "evaluate_every": 5})  # these change no numbers
    make_run("d", seed=0, settings={"bucket_by_length": True})
    found = settings([load_run(tmp_path / name) for name in "abcd"])
    assert sorted(len(group.runs) for group in found[0].groups) == [1, 3]


def test_joint_training_is_the_reference_for_intransigence(sweep: Path, make_run: MakeRun):
    assert "Intransigence" not in report([sweep]).with_suffix(".md").read_text()
    for seed in range(2):
        make_run(f"sweep/joint-{seed}", strategy="joint", seed=seed, keep=1.0)
    path = report([sweep])

    def diagonal(name: str) -> list[float]:
        matrix = json.loads((sweep / name / "results.json").read_text())["matrix"]
        return [matrix[i + 1][i] for i in range(5)]

    joint = [statistics.mean(values) for values in zip(diagonal("joint-0"), diagonal("joint-1"), strict=True)]
    expected = statistics.mean(j - r for j, r in zip(joint, diagonal("replay-1"), strict=True))
    lines = {line["run"]: line for line in table(path)}
    assert float(lines["replay-1"]["intransigence"]) == pytest.approx(expected)
    assert lines["joint-0"]["intransigence"] == ""
    assert "Intransigence" in path.with_suffix(".md").read_text()


def test_two_kinds_of_joint_training_are_no_reference(sweep: Path, make_run: MakeRun):
    make_run("sweep/joint-a", strategy="joint", settings={"strategy.joint.strength": 1.0})
    make_run("sweep/joint-b", strategy="joint", settings={"strategy.joint.strength": 2.0})
    assert {line["intransigence"] for line in table(report([sweep]))} == {""}


def test_streams_and_backbones_are_kept_apart(make_run: MakeRun, tmp_path: Path):
    make_run("a")
    make_run("b", n=3)
    make_run("c", change=lambda results: results["backbone"].update(name="mlp"))
    make_run("d", scenario="domain_incremental")
    path = report([tmp_path / name for name in "abcd"], tmp_path / "out")
    assert path == tmp_path / "out" / "comparison.html"
    markdown = path.with_suffix(".md").read_text()
    assert markdown.count("\n## ") == 4
    assert "domain-incremental" in markdown


def test_the_same_seed_twice_is_no_second_sample(sweep: Path, make_run: MakeRun):
    make_run("sweep/zz-again", seed=1, keep=0.95)
    markdown = report([sweep]).with_suffix(".md").read_text()
    assert "| replay | 3 |" in markdown
    assert row(markdown, "zz-again")[1] == "repeated"


def test_one_run_has_no_deviation(make_run: MakeRun, tmp_path: Path):
    make_run("sweep/a")
    markdown = report([tmp_path / "sweep"]).with_suffix(".md").read_text()
    line = next(x for x in markdown.splitlines() if x.startswith("| replay | 1 |"))
    assert "±" not in line


def test_runs_link_to_their_reports(sweep: Path):
    report([sweep / "replay-0"])
    html = report([sweep]).read_text()
    assert '<a href="replay-0/report.html">' in html
    assert 'href="replay-1/report.html"' not in html  # it has none


def test_one_run_gives_its_own_report(make_run: MakeRun, tmp_path: Path):
    folder = make_run()
    assert report([folder]) == folder / "report.html"
    assert report([folder / "results.json"]) == folder / "report.html"
    assert report([folder], tmp_path / "elsewhere") == tmp_path / "elsewhere" / "report.html"


def test_the_same_run_named_twice_counts_once(sweep: Path):
    path = report([sweep, sweep / "replay-0"], sweep)
    assert len(table(path)) == 6


def test_no_runs(tmp_path: Path):
    with pytest.raises(ClplatformError, match="no runs in"):
        report([tmp_path])
    with pytest.raises(ClplatformError, match="no such folder"):
        report([tmp_path / "nowhere"])


def test_runs_without_a_configuration(make_run: MakeRun, tmp_path: Path):
    (make_run("sweep/a", seed=0) / "config.yaml").unlink()
    make_run("sweep/b", seed=1)
    markdown = report([tmp_path / "sweep"]).with_suffix(".md").read_text()
    assert "| replay | 2 |" in markdown


def test_other_scores_are_averaged_beside_the_primary_one(make_run: MakeRun, tmp_path: Path):
    def scored(seed: int, forgotten: float) -> Callable[[dict[str, Any]], None]:
        losses = [[None, None], [1.0 + seed, None], [1.0 + seed + forgotten, 2.0]]

        def change(results: dict[str, Any]) -> None:
            results["scores"] = {"nats_per_token": losses}

        return change

    for seed in range(2):
        make_run(f"sweep/replay-{seed}", seed=seed, n=2, change=scored(seed, 0.5))
        make_run(f"sweep/ewc-{seed}", strategy="ewc", seed=seed, n=2)
    path = report([tmp_path / "sweep"])
    text = path.with_suffix(".md").read_text()
    after = text[text.index("Other scores") :]
    # Average of the last row: (1.5 + 2) / 2 and (2.5 + 2) / 2; a loss that rises by 0.5 is forgetting of 0.5
    assert row(after, "replay") == ["replay", "2 ± 0.3536", "+0.5 ± 0"]
    assert row(after, "ewc") == ["ewc", "–", "–"]
    assert "Nats per token" in path.with_suffix(".tex").read_text()
