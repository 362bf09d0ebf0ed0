"""The report of one run, in HTML and Markdown."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from clplatform.metric.matrix import METRICS
from clplatform.report import write_report
from clplatform.tracking.local import to_line
from clplatform.tracking.logger import Row

MakeRun = Callable[..., Path]  # the fixture `make_run`


VOID = {"meta", "link", "br", "hr", "img", "input"}


class Checker(HTMLParser):
    """Collects text, ids and tags; complains of tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values[k] or "" for k in ("src", "href", "action") if k in values]


def read(path: Path) -> tuple[str, Checker]:
    html = path.read_text()
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return html, checker


def test_the_report_says_everything(make_run: MakeRun):
    folder = make_run()
    path = write_report(folder)
    assert path == folder / "report.html"
    html, page = read(path)
    results = json.loads((folder / "results.json").read_text())
    markdown = (folder / "report.md").read_text()
    average = sum(results["matrix"][-1]) / 5
    for text in (page.text, markdown.replace("\\", "")):
        assert f"{100 * average:.1f} %" in text
        assert f"{100 * results['matrix'][3][1]:.1f}" in text  # a cell of the matrix
        for metric in METRICS:
            assert metric.title in text
            assert metric.source in text
        assert "clplatform strategy=replay seed=0 'name=two words'" in text
        for word in ("digits 4–5", "vit_tiny", "class incremental", "PyTorch threads: 1", "0123abcd", "batch_size: 32"):
            assert word in text
        assert "1,295" in text  # all training samples
        assert "700.0 MiB" in text
        assert "2.15.0" in text
    assert html.count("<svg") == 8  # matrix, four curves, losses, confusions, times
    assert page.tags.count("figcaption") == html.count("<svg")


def test_the_page_stands_alone_and_is_accessible(make_run: MakeRun):
    html, page = read(write_report(make_run()))
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "http" not in re.sub(r"clplatform\S*", "", html)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids))
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert page.tags.count("table") == page.tags.count("caption")
    assert html.count('<svg role="img" aria-label="') == html.count("<svg")
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert html.startswith("<!DOCTYPE html>\n<html lang=")


def hostile(results: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>|`x`"
    results["stream"] |= {"name": evil, "experience_names": [evil] * 5, "class_names": [evil] * 10}
    results["strategy"], results["notes"] = [evil], [evil]
    results["backbone"]["name"] = evil
    results["error"] = {"type": evil, "message": evil}


def test_nothing_from_a_run_becomes_markup(make_run: MakeRun):
    path = write_report(make_run(change=hostile, status="failed"))
    html, page = read(path)
    assert "script" not in page.tags
    assert "<script>" not in html
    for line in path.with_suffix(".md").read_text().splitlines():
        if line.startswith("| "):
            assert "<script>" not in line.replace("\\<", "")
            assert len(re.findall(r"(?<!\\)\|", line)) in range(3, 10)


def test_a_failed_run_says_so_first(make_run: MakeRun):
    path = write_report(make_run(status="failed", learned=3))
    _, page = read(path)
    said = "This run failed after 3 of 5 experiences (RuntimeError: loss is <nan>)."
    assert said in page.text
    assert page.text.index(said) < page.text.index("Average accuracy")
    assert "clplatform resume" in page.text
    assert "**Status: failed**" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("learned", [0, 1, 2])
def test_a_run_in_progress(make_run: MakeRun, learned: int):
    _, page = read(write_report(make_run(status="running", learned=learned)))
    assert f"has learned {learned} of 5 experiences" in page.text
    assert "Confusions between" not in page.text


def test_lower_is_better(make_run: MakeRun):
    path = write_report(make_run(metric="perplexity"))
    text = path.with_suffix(".md").read_text()
    assert "| Average perplexity |" in text
    row = next(line for line in text.splitlines() if line.startswith("| Average perplexity | ") and "↓" in line)
    assert "%" not in row
    forgetting = next(line for line in text.splitlines() if line.startswith("| Average forgetting |") and "↓" in line)
    assert "| +" in forgetting  # a perplexity that rose is forgotten
    _, page = read(path)
    assert "lines that rise are forgotten" in page.text
    assert "the worst perplexity that each earlier experience fell to" in page.text


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda results: results.pop(name)


KEYS = [
    "run_id", "seed", "stream", "backbone", "strategy", "primary_metric", "code", "status", "matrix", "timing", "cost",
    "confusion", "notes", "metrics", "error",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_any_key_may_be_missing(make_run: MakeRun, key: str):
    read(write_report(make_run(n=2, change=drop(key))))


def clear(results: dict[str, Any]) -> None:
    for key, value in results.items():
        results[key] = type(value)() if isinstance(value, dict | list) else value


def test_everything_may_be_empty(make_run: MakeRun):
    folder = make_run(n=2, change=clear)
    for name in ("metrics.jsonl", "environment.json", "config.yaml", "accuracy_matrix.csv"):
        (folder / name).unlink()
    _, page = read(write_report(folder))
    assert "Not readable: metrics.jsonl is missing" in page.text
    assert "Nothing has been evaluated yet." in page.text
    assert "The command line was not recorded" in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"confusion": [[1, 2], [3]]}, {"confusion": "x"}, {"confusion": [[0, 0], [0, 0]]}, {"timing": [{}, None]},
        {"cost": {"seconds": "NaN", "steps": None}}, {"matrix": [["a"]]}, {"matrix": [[None], ["NaN"]]},
        {"confusion": 3}, {"stream": {"classes_per_experience": [0, 4]}}, {"notes": None}, {"stream": None},
    ],
)  # fmt: skip
def test_odd_values_do_not_stop_a_report(make_run: MakeRun, change: dict[str, Any]):
    read(write_report(make_run(n=2, change=lambda results: results.update(change))))


def test_a_diverged_loss_is_said(make_run: MakeRun):
    folder = make_run(n=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(to_line(Row(999, 2, 1, "main", {"train/loss": math.nan, "train/task": 1.0, "train/lr": 0.1})))
    _, page = read(write_report(folder))
    assert "1 logged losses are not finite" in page.text


def test_a_class_order_that_no_seed_decided_is_fixed(make_run: MakeRun):
    for seed in (None, -1):
        _, page = read(write_report(make_run(n=2, change=lambda r, seed=seed: r["stream"].update(seed=seed))))
        assert "class order fixed" in page.text
    _, page = read(write_report(make_run(n=2, change=lambda r: r["stream"].update(seed=3))))
    assert "class order 3" in page.text


def test_the_path_of_a_pretrained_model_stays_private(make_run: MakeRun):
    def pretrained(results: dict[str, Any]) -> None:
        results["backbone"] |= {"pretrained": True, "source": "/home/someone/models/minilm"}

    html, page = read(write_report(make_run(n=2, change=pretrained)))
    assert "pretrained (minilm)" in page.text
    assert "/home/someone" not in html


def test_many_classes_and_experiences(make_run: MakeRun):
    html, page = read(write_report(make_run(n=15, classes=10)))
    assert "Confusion matrix of 150 classes" in html
    assert "Confusion matrix of 15 experiences" in html
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)


def test_reports_are_reproducible(make_run: MakeRun):
    folder = make_run(n=3)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_a_report_imports_no_heavy_library(make_run: MakeRun):
    folder = make_run(n=2)
    code = (
        "import sys; from pathlib import Path; from clplatform.report import report; report([Path(sys.argv[1])]);"
        "print([m for m in ('torch', 'pytorch_lightning', 'hydra', 'avalanche', 'pandas', 'matplotlib.pyplot')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_kept_stands_beside_the_time_of_each_experience(make_run: MakeRun, tmp_path: Path):
    make_run("plain")
    make_run("grows", change=lambda results: results.update(kept_bytes=[1024 * (i + 1) for i in range(5)]))
    plain, grows = (write_report(tmp_path / name).with_suffix(".md").read_text() for name in ("plain", "grows"))
    assert "kept beside the model after it" not in plain
    assert "| sum | kept |" in grows and "| 3.0 KiB |" in grows and grows.count("| 5.0 KiB |") == 2
