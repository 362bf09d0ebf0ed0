"""The section of a run's report on what earlier experiences lose while the next one is being learned."""

from __future__ import annotations

from typing import Any

from clplatform.metric.continual import Row, in_order, measures
from clplatform.metric.matrix import average_accuracy
from clplatform.metric.score import is_share, word
from clplatform.report import diagnosis_figures
from clplatform.report.document import Figure, Part, Section, Table
from clplatform.report.format import difference, score
from clplatform.report.run import Run, number, read_lines


def stability(run: Run) -> Section:
    """Curves between the ends of experiences, and the worst values; empty for a run without `evaluate_every`."""
    rows = read_rows(run)
    if not rows:
        return Section("stability", "While learning", [])
    name, names = run.metric_name, run.names
    last = max(len(row["scores"]) for row in rows)
    points = {
        names[i] if i < len(names) else f"experience {i + 1}": [
            (row["step"], row["scores"][i])
            for row in rows
            if i < len(row["scores"]) and row["scores"][i] is not None
        ]
        for i in range(last)
    }  # fmt: skip
    ends = [row["step"] for row in rows if row["end"]]
    unit = " (%)" if is_share(name) else ""
    fall = "falls" if run.higher_is_better else "rises"
    reading = (
        "Dashed lines are where an experience ends. A curve that "
        f"{fall} right behind one and comes back before the next has a stability gap: the evaluation at the ends alone does "
        "not show it; one that stays where it fell to is forgetting."
    )
    svg = diagnosis_figures.curves(points, ends[:-1], name, f"test {word(name)}{unit}", "stability")
    parts: list[Part] = [Figure("While later experiences are learned", svg, reading, wide=True)]
    parts.extend(worst(run, rows))
    return Section("stability", "While learning", parts)


def worst(run: Run, rows: list[Row]) -> list[Part]:
    """How low each experience fell, and the measures of it."""
    name, found = run.metric_name, measures(rows, run.higher_is_better)
    at_end = run.matrix[-1] if run.matrix else []
    recorded = run.part("continual_evaluation")
    lines = []
    for i, value in enumerate(found["worst"]):
        end = at_end[i] if i < len(at_end) else None
        back = None if value is None or end is None else end - value
        lines.append([f"{i + 1} · {run.names[i]}", score(value, name), score(end, name), difference(back, name)])
    if not lines:
        return []
    samples = number(recorded.get("samples"))
    of = f" (on {samples:.0f} test samples of each)" if samples else ""
    known = [
        ["min-ACC", score(found["min_acc"], name), f"mean of the worst values of all experiences but the last{of}"],
        ["WC-ACC", score(found["wc_acc"], name), "1/k of the newest experience's value at the end and 1 − 1/k of min-ACC: the average if all fell at once"],
        ["at the end", score(average_accuracy(run.matrix), name), f"average {word(name)} as the matrix has it, for comparison"],
    ]  # fmt: skip
    return [
        Table("Worst value of each experience after it was learned", ["experience", "worst", "at the end", "regained"],
              lines, half=True, folded=len(lines) > 12),
        Table("Worst case (De Lange et al. 2023)", ["measure", "value", "what it says"], known, half=True, prose=True),
    ]  # fmt: skip


def read_rows(run: Run) -> list[Row]:
    """The run's evaluations between the ends; lines that are something else are left out."""
    rows, broken = read_lines(run.folder / "continual_evaluation.jsonl")
    kept = [row for row in map(_row, rows or []) if row is not None]
    if rows is not None and broken + len(rows) - len(kept):
        run.problems.append("continual_evaluation.jsonl: some lines could not be read")
    return in_order(kept)


def _row(row: dict[str, Any]) -> Row | None:
    step, experience, scores = row.get("step"), row.get("experience"), row.get("scores")
    if not (isinstance(step, int) and isinstance(experience, int) and isinstance(scores, list)):
        return None
    values = [number(value) for value in scores]
    return {"step": step, "experience": experience, "end": row.get("end") is True, "scores": values}
