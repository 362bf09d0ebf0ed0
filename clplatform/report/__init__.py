"""Reports over run directories: one run, or many compared. Imports no torch; matplotlib only when it draws."""

from __future__ import annotations

import os
from pathlib import Path

from clplatform.types import ClplatformError


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write `report.html` and `report.md` of one run, into its directory or `output`.

    Returns:
        The path of the HTML file.

    Raises:
        ClplatformError: the directory holds no readable run.
    """
    from clplatform.report.run import load_run
    from clplatform.report.single import document

    return _write(document(load_run(Path(run_dir))), Path(output or run_dir), "report")


def report(paths: list[Path], output: Path | None = None) -> Path:
    """The report of one run, or the comparison of several runs or of all runs below a folder.

    A comparison of two runs or more has tables for LaTeX (`comparison.tex`) and its figures as files (`figures/`) beside it.

    Args:
        paths: run directories, or folders that hold some at any depth.
        output: folder to write to; default: the run's own, or for a comparison the folder that holds all runs.

    Returns:
        The path of the HTML file (`report.html` or `comparison.html`).

    Raises:
        ClplatformError: a path does not exist, or there are no runs.
    """
    from clplatform.report.run import find_runs

    paths = [Path(path) for path in paths]
    found = [find_runs(path) for path in paths]
    runs = list(dict.fromkeys(p.resolve() for some, _ in found for p in some))
    empty = list(dict.fromkeys(p.resolve() for _, some in found for p in some))
    if not runs and not empty:
        where = ", ".join(map(str, paths)) or "no path given"
        raise ClplatformError(f"no runs in {where}: a run directory has a results.json")
    if len(paths) == 1 and runs == [(paths[0].parent if paths[0].is_file() else paths[0]).resolve()]:
        return write_report(paths[0].parent if paths[0].is_file() else paths[0], output)
    from clplatform.report.compare import compare

    if output is None:
        folder = paths[0] if len(paths) == 1 else Path(os.path.commonpath([*runs, *empty]))
        output = folder.parent if folder.resolve() in runs else folder
    compared = compare(runs, empty, Path(output))
    html = _write(compared.document, Path(output), "comparison")
    _save(html.with_suffix(".csv"), compared.csv.encode())
    if compared.averaged > 1:
        _save(html.with_suffix(".tex"), compared.tex.encode())
        _save_figures(compared.document, Path(output) / "figures")
    return html


def _save_figures(document: object, folder: Path) -> None:
    from clplatform.report.document import Document
    from clplatform.report.export import clear, figure_files

    assert isinstance(document, Document)
    written = {_save(folder / name, content).name for name, content in figure_files(document)}
    clear(folder, keep=written)


def _write(document: object, folder: Path, name: str) -> Path:
    from clplatform.report.document import Document
    from clplatform.report.html import render_html
    from clplatform.report.markdown import render_markdown

    assert isinstance(document, Document)
    _save(folder / f"{name}.md", render_markdown(document).encode())
    return _save(folder / f"{name}.html", render_html(document).encode())


def _save(path: Path, content: bytes) -> Path:
    from clplatform.files import atomic_write

    try:
        atomic_write(path, content)
    except OSError as error:
        raise ClplatformError(
            f"{path} cannot be written ({error.strerror}); choose another folder with --output"
        ) from None
    return path
