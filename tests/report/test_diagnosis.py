"""The sections on the diagnosis and on the stability gap: what they say, and that nothing broken stops a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from clplatform.report import write_report

MakeRun = Callable[..., Path]
LAYERS = ["embeddings", "block 1", "features"]


class Page(HTMLParser):
    """Text and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def read(path: Path) -> tuple[str, Page]:
    page = Page()
    page.feed(path.read_text())
    page.close()
    return path.read_text(), page


def diagnosis(**changes: Any) -> dict[str, Any]:
    """As `clplatform diagnose` leaves it, of a run of three experiences."""
    values = {
        "schema_version": 1, "run_id": f"{0:012x}", "options": {}, "notes": ["A note of the diagnosis."],
        "head_bias": {
            "old": [0.9, 0.8, 0.95], "now": [0.1, 0.2, 0.95], "refit": [0.7, 0.5, 0.6], "untrained_refit": [0.3, 0.3, 0.3],
            "shares": [0.75, 0.5], "forgotten": 0.7, "recovered": 0.45, "share": 0.643, "untrained_share": 0.214,
            "bias": {"old_as_new": 0.81, "old_as_new_each": [0.8, 0.82], "new_as_old": 0.02, "margin_old": -4.25, "margin_new": -6.5},
        },
        "drift": {
            "layers": LAYERS, "cka_linear": [[0.91, 0.92], [0.5, 0.6], [0.31, 0.4]],
            "cka_unbiased": [[0.87, 0.9], [0.41, 0.5], [-0.02, None]], "probe_final": [[0.51, 0.6, 0.7]] * 3,
            "probe_then": [[0.91, 0.93, 0.7]] * 3, "probe_untrained": [[0.5, 0.5, 0.5]] * 3,
        },
        "relearning": {
            "level": 0.9, "most": 80, "experiences": [
                {"experience": 0, "old": 0.9, "target": 0.81, "again": 7, "again_start": 0.1, "scratch": 28,
                 "scratch_start": 0.0, "first": None, "first_kept": False, "savings": 0.75, "at_least": False},
                {"experience": 1, "old": 0.8, "target": 0.72, "again": 12, "again_start": 0.2, "scratch": None,
                 "scratch_start": 0.0, "first": None, "first_start": 0.1, "first_kept": True, "savings": 0.85,
                 "at_least": True},
            ],
        },
    }  # fmt: skip
    return {**values, **changes}


def written(run: Path, values: Any) -> Path:
    (run / "diagnosis.json").write_text(json.dumps(values))
    return run


def test_what_was_found_is_shown(make_run: MakeRun) -> None:
    run = make_run(n=3)
    html, page = read(write_report(run))
    before = html.count("<svg")
    html, page = read(write_report(written(run, diagnosis())))
    assert html.count("<svg") == before + 4  # head, similarity, probes, relearning
    assert page.tags.count("figcaption") == html.count("<svg")
    markdown = (run / "report.md").read_text()
    for text in (page.text, markdown.replace("\\", "")):
        assert "lost 70.0 pp" in text
        assert "brings back 45.0 pp: 64 % of the forgetting is the head" in text
        assert "would bring back 21 %: well below." in text
        for value in ("81 %", "−4.25", "−6.50", "75 %", "≥ 85 %", "> 80", "−0.02 / 0.31", "A note of the diagnosis."):
            assert value in text, value
        assert "Not readable" not in text


def test_features_that_need_no_learning_are_said(make_run: MakeRun) -> None:
    values = diagnosis()
    values["head_bias"]["untrained_share"] = 0.9
    _, page = read(write_report(written(make_run(n=3), values)))
    assert "would bring back 90 %: the data are that easy" in page.text


def test_what_is_missing_and_how_to_get_it(make_run: MakeRun) -> None:
    run = make_run(n=3)
    _, page = read(write_report(run))
    assert f"clplatform diagnose {run}" in page.text
    drift = {**diagnosis()["drift"], "missing": "with keep_models=true there would be"}
    del drift["cka_linear"], drift["cka_unbiased"]
    relearned = diagnosis()["relearning"]
    rows = [{**relearned["experiences"][0]}]
    values = diagnosis(
        drift=drift, relearning={**relearned, "experiences": rows}, head_bias={"left_out": "it has no classes"}
    )
    _, page = read(write_report(written(run, values)))
    assert "No head bias: it has no classes." in page.text
    assert "No similarity to earlier models: with keep_models=true there would be." in page.text
    assert "the model before each experience was not kept (keep_models=true)" in page.text


def test_a_run_that_is_not_complete_is_not_to_be_diagnosed(make_run: MakeRun) -> None:
    _, page = read(write_report(make_run(n=3, status="running", learned=2)))
    assert "Why it forgot" not in page.text


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "3", json.dumps(diagnosis(run_id="another")), json.dumps(diagnosis(head_bias={})),
        json.dumps(diagnosis(drift={"layers": 3, "probe_final": [[0.5]]})), json.dumps(diagnosis(relearning={"experiences": [{}]})),
        json.dumps(diagnosis(head_bias=3, drift=[], relearning=None, notes=None)),
        json.dumps({**diagnosis(), "drift": {"layers": LAYERS, "cka_unbiased": [["x"]]}}),
    ],
)  # fmt: skip
def test_nothing_broken_stops_a_report(content: str, make_run: MakeRun) -> None:
    run = make_run(n=3)
    (run / "diagnosis.json").write_text(content)
    _, page = read(write_report(run))
    assert "diagnosis.json" in page.text or "=3" in content or '"head_bias": 3' in content


CURVE = [
    {"step": 5, "experience": 0, "end": False, "scores": [0.5]},
    {"step": 10, "experience": 0, "end": True, "scores": [0.9]},
    {"step": 15, "experience": 1, "end": False, "scores": [0.123, 0.4]},
    {"step": 20, "experience": 1, "end": True, "scores": [0.6, 0.8]},
]


def test_the_stability_gap(make_run: MakeRun) -> None:
    run = make_run(n=2)
    _, page = read(write_report(run))
    assert "While learning" not in page.text
    lines = [json.dumps(row) for row in [*CURVE[:3], {**CURVE[2], "scores": [0.234, 0.4]}, CURVE[3]]]
    (run / "continual_evaluation.jsonl").write_text("\n".join(lines) + '\n{"step": 99')
    _, page = read(write_report(run))
    assert "While later experiences are learned" in page.text
    assert "23.4 %" in page.text  # evaluated twice: the last counts
    assert "12.3 %" not in page.text
    assert "51.7 %" in page.text  # 0.8 / 2 + 0.234 / 2
    assert "continual_evaluation.jsonl" not in page.text


def test_broken_lines_are_said(make_run: MakeRun) -> None:
    run = make_run(n=2)
    lines = ["nonsense", json.dumps({"step": "x"}), *map(json.dumps, CURVE)]
    (run / "continual_evaluation.jsonl").write_text("\n".join(lines) + "\n")
    _, page = read(write_report(run))
    assert "continual_evaluation.jsonl: some lines could not be read" in page.text


def test_a_perplexity_s_worst_is_its_highest(make_run: MakeRun) -> None:
    run = make_run(n=2, metric="perplexity")
    rows = [{**row, "scores": [10 * s for s in row["scores"]]} for row in CURVE]
    (run / "continual_evaluation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    _, page = read(write_report(run))
    assert "A curve that rises" in page.text
    table = page.text[page.text.index("Worst value of each") :]
    assert table[: table.index("Worst case")].split().count("6") == 1  # 6 and not 1.23
