"""Measures of what happens while an experience is being learned, from evaluations every few steps.

De Lange, van de Ven & Tuytelaars 2023, "Continual Evaluation for Lifelong Learning: Identifying the Stability Gap".
A(E_i, f_n): the score on experience i after n optimizer steps; experience k is the last one learned.

    min-ACC = 1/(k−1) · Σ_{i<k} min_n A(E_i, f_n),   n: all steps after experience i was learned
    WC-ACC  = 1/k · A(E_k, f) + (1 − 1/k) · min-ACC

Where lower is better, the worst is the highest value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# One evaluation: `step` of the run, `experience` (0-based: the one being learned), `scores` of all experiences so far (None: it
# has no meaning), `end`: is it the one at the end of the experience, consolidated?
Row = dict[str, Any]


def in_order(rows: Iterable[Row]) -> list[Row]:
    """In the order of the run. What was evaluated twice, because a run went on from before it, counts as it was evaluated
    last."""
    found = {(row["experience"], row["step"], row["end"]): row for row in rows}
    return [found[key] for key in sorted(found)]


def measures(rows: Sequence[Row], higher_is_better: bool = True) -> dict[str, Any]:
    """`worst` of each experience before the last complete one (A at its lowest after it was learned), `min_acc` and
    `wc_acc`; None where there is nothing to measure yet."""
    worst_of = min if higher_is_better else max
    last = max((row["experience"] for row in rows if row["end"]), default=0)
    worst: list[float | None] = []
    for i in range(last):
        values = [r["scores"][i] for r in rows if i < r["experience"] <= last and r["scores"][i] is not None]
        worst.append(worst_of(values) if values else None)
    known = [value for value in worst if value is not None]
    ends = [row["scores"][last] for row in rows if row["experience"] == last and row["end"]]
    min_acc = sum(known) / len(known) if known else None
    wc_acc = None
    if min_acc is not None and ends and ends[-1] is not None:
        wc_acc = ends[-1] / (last + 1) + (1 - 1 / (last + 1)) * min_acc
    return {"worst": worst, "min_acc": min_acc, "wc_acc": wc_acc}
