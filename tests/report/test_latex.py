"""Tables for a paper: what is bold, what is escaped, and that LaTeX takes them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from clplatform.metric.matrix import METRICS
from clplatform.report import report
from clplatform.report.grouping import settings
from clplatform.report.latex import averages_tex, escape, higher_is_better
from clplatform.report.run import load_run

MakeRun = Callable[..., Path]  # the fixture `make_run`


@pytest.fixture
def sweep(make_run: MakeRun, tmp_path: Path) -> Path:
    for seed in range(2):
        for name, keep in (("joint", 1.0), ("er_ace", 0.95), ("replay", 0.9), ("finetuning", 0.3)):
            make_run(
                f"sweep/{name}-{seed}", strategy=name, keep=keep, seed=seed,
                settings={"strategy.replay.kind": "50 % & {more}_$#~^\\"},
            )  # fmt: skip
    for value in ("a<b>|c", "Größe – α → ≥"):
        make_run(f"sweep/{ord(value[0])}", strategy="ewc", keep=0.6, settings={"strategy.ewc.kind": value})
    return tmp_path / "sweep"


def cells(tex: str, start: str) -> list[str]:
    line = next(line for line in tex.splitlines() if line.startswith(f"{start} & "))
    return line.removesuffix(r" \\").split(" & ")


def test_the_best_is_bold_and_the_second_underlined(sweep: Path):
    tex = report([sweep]).with_suffix(".tex").read_text()
    titles = next(line for line in tex.splitlines() if line.startswith("Strategy")).split(" & ")
    forgetting = next(i for i, title in enumerate(titles) if "forgetting" in title)
    best, second, last = cells(tex, r"er\_ace"), cells(tex, "replay"), cells(tex, "finetuning")
    assert re.fullmatch(r"\$\\mathbf\{\d\d\.\d\} \\pm \d\.\d\$", best[2])  # average accuracy
    assert re.fullmatch(r"\$\\underline\{\d\d\.\d\} \\pm \d\.\d\$", second[2])
    assert re.fullmatch(r"\$\d\d\.\d \\pm \d\.\d\$", last[2])
    assert best[forgetting].startswith(r"$\mathbf{+")  # the lowest
    assert second[forgetting].startswith(r"$\underline{+")
    assert "bf" not in "".join(cells(tex, "joint"))  # a bound is not in the contest
    assert tex.index("finetuning &") < tex.index("joint &")


def test_where_lower_is_better_the_lowest_is_bold(make_run: MakeRun, tmp_path: Path):
    for name, keep in (("ewc", 0.5), ("replay", 0.95)):
        make_run(name, strategy=name, keep=keep, metric="perplexity")
    [setting] = settings([load_run(tmp_path / name) for name in ("ewc", "replay")])
    directions = {metric.name: higher_is_better(metric, setting) for metric in METRICS}
    assert not directions["average_accuracy"]
    assert not directions["average_forgetting"]  # its sign is turned already
    assert directions["backward_transfer"]
    tex = averages_tex(setting, "s")
    assert cells(tex, "replay")[2].startswith(r"$\mathbf{")
    assert cells(tex, "ewc")[2].startswith(r"$\underline{")
    assert "percent" not in tex


def test_what_reads_the_same_is_as_good(make_run: MakeRun, tmp_path: Path):
    for name in ("ewc", "joint", "replay"):
        make_run(name, strategy=name, change=lambda r: r.update(matrix=[[None, None], [0.9, None], [0.5, 0.8]], stream={
            **r["stream"], "n_experiences": 2, "experience_names": ["a", "b"]}))  # fmt: skip
    [setting] = settings([load_run(tmp_path / name) for name in ("ewc", "joint", "replay")])
    tex = averages_tex(setting, "s")
    assert cells(tex, "joint")[2] == "$65.0$"  # a bound, whatever it reaches
    assert cells(tex, "ewc")[2] == cells(tex, "replay")[2] == r"$\mathbf{65.0}$"
    assert "underline" not in tex


def test_special_characters_are_escaped():
    assert escape("a_b & 5 % {x} $#") == r"a\_b \& 5 \% \{x\} \$\#"
    assert escape("\\~^<>|") == (
        r"\textbackslash{}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"
    )
    assert escape("−1 ± 2 – Größe ŏ\n漢") == r"$-$1 $\pm$ 2 -- Größe o ?"


def parse(tex: str) -> None:
    """Braces, math and environments in balance, and every row as long as its table is wide."""
    plain = re.sub(r"\\[\\{}$&#%_]", lambda m: "  " if m[0] != r"\\" else m[0], re.sub(r"(?m)^%.*$", "", tex))
    depth = 0
    for character in plain:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert plain.count("$") % 2 == 0
    open_ = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", plain):
        assert kind == "begin" or open_.pop() == name
        if kind == "begin":
            open_.append(name)
    assert not open_
    for spec, body in re.findall(r"\\begin\{tabular\}\{@\{\}(lr*)@\{\}\}(.*?)\\bottomrule", plain, re.DOTALL):
        rows = [line for line in body.splitlines() if line.rstrip().endswith(r"\\")]
        assert len(rows) > 1
        assert {line.count("&") for line in rows} == {len(spec) - 1}


def test_it_is_sound_latex(sweep: Path):
    tex = report([sweep]).with_suffix(".tex").read_text()
    assert tex.count(r"\begin{table}") == 1 + 3  # averages, and against the best, finetuning and replay
    assert len(set(re.findall(r"\\label\{([^}]*)\}", tex))) == tex.count(r"\caption{") == 4
    parse(tex)
    with pytest.raises(AssertionError):
        parse(tex.replace(" & ", " ", 1))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_takes_it(sweep: Path, tmp_path: Path):
    tex = report([sweep]).with_suffix(".tex")
    page = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}"]
    page += [rf"\input{{{tex.as_posix()}}}", r"\end{document}"]
    (tmp_path / "page.tex").write_text("\n".join(page))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
