"""Trade-offs, sensitivities, and ranks over streams."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clplatform.report import report
from clplatform.report.document import Figure, Table, Text
from clplatform.report.grouping import Setting, settings
from clplatform.report.pareto import front, pareto_parts
from clplatform.report.rank_diagram import cliques
from clplatform.report.ranking import ranking
from clplatform.report.run import load_run
from clplatform.report.sensitivity import numeric_settings, sensitivities

MakeRun = Callable[..., Path]  # the fixture `make_run`


def texts(drawing: str) -> list[str]:
    return [t.strip() for t in re.findall(r"<text[^>]*>([^<]*)</text>", drawing)]


def found_in(folder: Path) -> list[Setting]:
    return settings([load_run(path.parent) for path in sorted(folder.glob("*/results.json"))])


# -- trade-offs -----------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_dominates():
    points = [(1.0, 0.2), (2.0, 0.8), (3.0, 0.7), (4.0, 0.9), (4.0, 0.85), (0.5, 0.2)]
    assert front(points) == [5, 1, 3]  # cheapest first; the first point costs more than the last for the same
    assert front(points, higher_is_better=False) == [5]
    assert front([(1.0, 0.5), (1.0, 0.5)]) == [0, 1]  # equals do not dominate each other


@pytest.fixture
def priced(make_run: MakeRun, tmp_path: Path) -> Setting:
    def spend(seconds: float, buffer: int | None) -> Callable[[dict[str, Any]], None]:
        def change(results: dict[str, Any]) -> None:
            results["cost"] = {"seconds": seconds, "peak_memory_bytes": 1000 + seconds / 10}
            results["cost"] |= {} if buffer is None else {"buffer_bytes": buffer}

        return change

    make_run("cheap", strategy="finetuning", keep=0.3, change=spend(10, None))
    make_run("dear", strategy="ewc", keep=0.6, change=spend(30, None))
    make_run("good", strategy="replay", keep=0.95, change=spend(20, 4096))
    make_run("all", strategy="joint", keep=1.0, change=spend(15, None))
    return found_in(tmp_path)[0]


def test_costs_that_vary_are_drawn_and_the_front_is_said(priced: Setting):
    *drawn, table = pareto_parts(priced, "s")
    assert isinstance(table, Table)
    assert table.header == ["strategy", "time", "memory of samples and masks"]  # peak memory differs by 0.2 %
    assert {row[0]: list(row[1:]) for row in table.rows} == {
        "finetuning": ["on the front", "beaten by ewc"],
        "ewc": ["beaten by replay", "on the front"],
        "replay": ["on the front", "on the front"],
        "joint": ["a bound", "a bound"],  # which keeps all data, and beats nobody
    }
    time = drawn[0]
    assert isinstance(time, Figure)
    assert {"finetuning", "replay", "ewc", "joint", "time (s)"} <= set(texts(time.svg))
    assert "on the Pareto front: finetuning, replay" in time.svg


def test_nothing_is_drawn_where_no_cost_varies(make_run: MakeRun, tmp_path: Path):
    make_run("a", strategy="ewc")
    make_run("b", strategy="replay")
    assert pareto_parts(found_in(tmp_path)[0], "s") == []


# -- sensitivities --------------------------------------------------------------------------------------------------


def test_one_numeric_setting_is_an_axis(make_run: MakeRun, tmp_path: Path):
    for i, strength in enumerate((0.1, 1.0, 100.0)):
        for seed in range(2):
            make_run(f"{i}-{seed}", seed=seed, settings={"strategy.replay.strength": strength})
    [figure] = sensitivities(found_in(tmp_path)[0], "s")
    assert figure.title == "Sensitivity of replay"
    assert {"strength", "0.1", "1", "10", "100"} <= set(texts(figure.svg))  # logarithmic


def test_two_settings_are_an_axis_and_lines(make_run: MakeRun, tmp_path: Path):
    for i, strength in enumerate((1.0, 2.0, 3.0)):
        for lr in (0.1, 0.01):
            make_run(f"{i}-{lr}", settings={"strategy.replay.strength": strength, "optimizer.lr": lr})
    [figure] = sensitivities(found_in(tmp_path)[0], "s")
    assert {"strength", "lr=0.01", "lr=0.1", "1.50"} <= set(texts(figure.svg))  # linear


def test_settings_that_change_together_count_once(make_run: MakeRun, tmp_path: Path):
    for epochs in (1, 2, 4):
        make_run(f"{epochs}", settings={"trainer.max_epochs": epochs, "stream.epochs": epochs})
    assert len(numeric_settings(found_in(tmp_path)[0].groups)) == 1


def test_names_are_no_axis(make_run: MakeRun, tmp_path: Path):
    for kind in ("a", "b", "c"):
        make_run(kind, settings={"strategy.replay.kind": kind})
    assert sensitivities(found_in(tmp_path)[0], "s") == []


# -- ranks ----------------------------------------------------------------------------------------------------------


def make_streams(make_run: MakeRun, streams: int, seeds: int = 2) -> None:
    for stream in range(streams):
        for name, keep in (("joint", 1.0), ("replay", 0.95), ("ewc", 0.6), ("finetuning", 0.3)):
            for seed in range(seeds):
                make_run(
                    f"{stream}-{name}-{seed}", strategy=name, keep=keep, seed=seed,
                    change=lambda r, s=stream: r["stream"].update(name=f"stream_{s}"),
                )  # fmt: skip


def test_ranks_over_streams(make_run: MakeRun, tmp_path: Path):
    make_streams(make_run, 3)
    make_run("only", strategy="si", change=lambda r: r["stream"].update(name="stream_1"))
    section = ranking(found_in(tmp_path))
    table, text, diagram, absent = section.parts
    assert isinstance(table, Table)
    assert isinstance(text, Text)
    assert isinstance(diagram, Figure)
    assert isinstance(absent, Text)
    assert [row[:2] for row in table.rows] == [["replay", "1.00"], ["ewc", "2.00"], ["finetuning", "3.00"]]
    assert table.rows[1][4].startswith("2 · ")
    assert "χ²_F = 6.00, p = 0.03" in text.text
    assert "less than 1.91" in text.text  # 2.343 · √(3 · 4 / 18)
    assert "from replay, that is ewc." in text.text
    assert absent.text.endswith("not every stream has them: si.")
    assert "critical difference 1.91" in texts(diagram.svg)


def test_two_streams_prove_nothing(make_run: MakeRun, tmp_path: Path):
    make_streams(make_run, 2, seeds=1)
    text = report([tmp_path]).with_suffix(".md").read_text()
    assert "Ranking over 2 streams" in text
    assert "p cannot be below 0.17" in text


def test_one_stream_has_no_ranking(make_run: MakeRun, tmp_path: Path):
    make_streams(make_run, 1, seeds=1)
    assert not ranking(found_in(tmp_path)).parts


def test_bars_join_what_is_not_told_apart():
    assert cliques([1.0, 1.5, 3.0, 3.2], 1.0) == [(0, 1), (2, 3)]
    assert cliques([1.0, 1.5, 2.2], 1.0) == [(0, 1), (1, 2)]
    assert cliques([1.0, 1.1, 1.2], 1.0) == [(0, 2)]
    assert cliques([1.0, 2.0], 1.0) == []  # a difference of exactly the critical one is significant
