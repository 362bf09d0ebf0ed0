"""What a run measures beside its primary metric, and what its model writes."""

from __future__ import annotations

from typing import Any

from clplatform.metric.matrix import METRICS, summarize
from clplatform.metric.score import SCORES, is_share, title, word
from clplatform.report.document import Figure, Part, Section, Table
from clplatform.report.format import NONE, metric_value, score, shorten, spread
from clplatform.report.grouping import Setting
from clplatform.report.heatmap import matrix_map
from clplatform.report.run import Matrix, Run

SHOWN = ("average_accuracy", "average_forgetting", "backward_transfer", "learning_accuracy")


def other_scores(run: Run) -> Section:
    """A matrix and its summary for each score that is not the primary metric."""
    found = _scores(run)
    if not found:
        return Section("scores", "", [])
    rows, parts = [], []
    for name, matrix in found.items():
        known = SCORES[name]
        values = summarize(matrix, known.higher_is_better)
        cells = [metric_value(metric, values[metric], name) for metric in SHOWN]
        rows.append([known.title, *cells, known.formula, known.source])
        parts += _matrix(run, name, matrix)
    titles = {metric.name: metric.title.replace("accuracy", "value") for metric in METRICS}
    header = ["score", *(titles[metric] for metric in SHOWN), "formula", "source"]
    caption = "Other scores; forgetting > 0 means that they got worse, whatever their direction"
    summary = Table(caption, header, rows, prose=True, formulas=len(SHOWN) + 1)
    return Section("scores", "Other scores", [summary, *parts])


def averages_of_others(setting: Setting) -> list[Table]:
    """Mean ± standard deviation of every score that some run of a comparison has beside the primary one; no table
    without any."""
    kept = {id(run): _scores(run) for group in setting.groups for run in group.runs}
    names = [name for name in SCORES if any(name in found for found in kept.values())]
    header = [f"{title(name)}, {titled}" for name in names for titled in ("average", "forgetting")]
    rows = []
    for group in setting.groups:
        cells = []
        for name in names:
            higher = SCORES[name].higher_is_better
            found = [summarize(m, higher) for run in group.runs if (m := kept[id(run)].get(name))]
            for metric in ("average_accuracy", "average_forgetting"):
                cells.append(spread([v for values in found if (v := values[metric]) is not None], metric, name))
        rows.append([group.label, *cells])
    caption = "Other scores, mean ± sample standard deviation over seeds; forgetting > 0 means that they got worse"
    return [Table(caption, ["strategy", *header], rows, folded=len(rows) > 12)] if names else []


def _scores(run: Run) -> dict[str, Matrix]:
    return {name: matrix for name, matrix in run.part("scores").items() if name in SCORES and matrix}


def _matrix(run: Run, name: str, matrix: Matrix) -> list[Part]:
    """Heat map and table of one score."""
    unit = " in %" if is_share(name) else ""
    svg = matrix_map(
        matrix, run.names, name, f"scores-{name}", small=True, higher_is_better=SCORES[name].higher_is_better
    )
    rows = [
        [f"{i} · {run.names[i - 1]}" if i else "before training", *(score(v, name, unit=False) for v in row)]
        for i, row in enumerate(matrix)
    ]
    reading = f"{title(name)}{unit} on each experience (columns) after training up to each (rows)."
    return [
        Figure(f"{title(name)} matrix", svg, reading, third=True),
        Table(f"{title(name)}{unit}", ["after", *run.names], rows, folded=True),
    ]


def samples(run: Run) -> Section:
    """What the model writes for the same test samples after each experience."""
    written: dict[tuple[int, str], dict[str, Any]] = {}
    for after, found in enumerate(run.rows("samples")):
        for sample in found:
            key = int(sample["experience"]), str(sample["source"])
            entry = written.setdefault(key, {"reference": sample["reference"], "after": {}})
            entry["after"][after] = str(sample["written"])
    if not written:
        return Section("samples", "", [])
    parts: list[Part] = []
    for j, name in enumerate(run.names):
        own = {source: entry for (of, source), entry in written.items() if of == j}
        if not own:
            continue
        rows = []
        for source, entry in own.items():
            reference = entry["reference"]
            rows.append(["read", shorten(source, 300)])
            rows.append(["reference", shorten(reference if isinstance(reference, str) else " | ".join(reference), 300)])
            rows += [[f"after {after}", shorten(text, 300) or NONE] for after, text in entry["after"].items()]
        caption = f"{name}: what the model writes after each experience"
        parts.append(Table(caption, ["", "text"], rows, prose=True))
    return Section("samples", f"Samples ({word(run.metric_name)} is measured on all test data)", parts)
