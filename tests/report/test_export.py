"""Figures as files: that they can stand alone, and that no earlier ones stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from clplatform.report import figures, report
from clplatform.report.export import FAINT_ON_PAPER, INK_ON_PAPER, standalone, to_pdf
from clplatform.report.svg import FAINT, INK

MakeRun = Callable[..., Path]  # the fixture `make_run`


@pytest.fixture
def sweep(make_run: MakeRun, tmp_path: Path) -> Path:
    for seed in range(2):
        make_run(f"sweep/replay-{seed}", seed=seed, keep=0.95)
        make_run(f"sweep/ewc-{seed}", strategy="ewc", seed=seed, keep=0.4)
    return tmp_path / "sweep"


def test_every_figure_is_written_as_svg_and_as_pdf(sweep: Path):
    html = report([sweep]).read_text()
    files = {path.name for path in (sweep / "figures").iterdir()}
    names = {"setting-1-curves", "setting-1-matrix-1", "setting-1-matrix-2"}
    assert html.count("<svg") == len(names)
    assert files == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    for name in names:
        assert (sweep / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_runs_give_the_same_files(sweep: Path):
    report([sweep])
    before = {path.name: path.read_bytes() for path in (sweep / "figures").iterdir()}
    report([sweep])
    assert {path.name: path.read_bytes() for path in (sweep / "figures").iterdir()} == before


def test_figures_that_are_no_more_are_deleted_and_nothing_else(sweep: Path):
    report([sweep])
    (sweep / "figures" / "setting-1-matrix-7.svg").write_text("of before")
    (sweep / "figures" / "mine.svg").write_text("somebody's")
    report([sweep])
    files = {path.name for path in (sweep / "figures").iterdir()}
    assert "mine.svg" in files
    assert "setting-1-matrix-7.svg" not in files
    assert "setting-1-matrix-2.svg" in files


def test_one_run_has_no_files_for_a_paper(make_run: MakeRun, tmp_path: Path):
    make_run("sweep/a")
    report([tmp_path / "sweep"])
    assert not (tmp_path / "sweep" / "figures").exists()
    assert not (tmp_path / "sweep" / "comparison.tex").exists()


def test_an_svg_file_stands_alone():
    drawing = figures.lines({"<a>": [0.9, 0.5], "b": [0.8, 0.6]}, 1, "accuracy", "y", "name")
    file = standalone(drawing)
    root = ElementTree.fromstring(file)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width", "").endswith("pt")
    assert "currentColor" not in file
    assert "var(" not in file
    assert INK_ON_PAPER in file
    links = {e.get("{http://www.w3.org/1999/xlink}href") for e in root.iter()} - {None}
    ids = {f"#{e.get('id')}" for e in root.iter()}
    assert links
    assert links <= ids


def test_a_pdf_has_the_colours_of_a_white_page():
    drawing = figures.lines({"a": [0.9, 0.5], "b": [0.8, 0.6]}, 1, "accuracy", "y", "name")
    assert to_pdf(drawing.figure).startswith(b"%PDF")
    axes = drawing.figure.axes[0]
    colors = {line.get_color() for line in axes.get_ygridlines()} | {axes.xaxis.label.get_color()}
    assert colors == {FAINT_ON_PAPER, INK_ON_PAPER}
    assert not colors & {FAINT, INK}
