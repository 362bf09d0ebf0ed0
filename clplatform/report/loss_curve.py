"""The training loss and its terms over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clplatform.report.svg import FAINT, INK, SERIES, legend, new_figure, to_svg

MOST_POINTS = 250  # of a curve; more are drawn as means over equal stretches of steps


def losses(log: Sequence[Mapping[str, Any]], name: str = "losses") -> str | None:
    """Every logged loss term over the steps of the run; None if nothing was logged."""
    terms = loss_terms(log)
    if not terms:
        return None
    figure, axes = new_figure(7.6, 3.3)
    positive = []
    for i, (term, points) in enumerate(terms.items()):
        steps, values = thin(np.array(list(points)), np.array(list(points.values())))
        positive.append(values[values > 0])
        label = term.removeprefix("train/")
        color = INK if label == "loss" else SERIES[i % len(SERIES)]
        axes.plot(steps, values, color=color, linewidth=1.6 if label == "loss" else 1.2, label=label, zorder=3 - i / 99)
    for step in boundaries(log):
        axes.axvline(step, color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
    found = np.concatenate(positive) if positive else np.zeros(0)
    if found.size and found.max() > 1e3 * max(np.median(found), 1e-12):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set(xlabel="optimizer steps of the whole run", ylabel="loss")
    if len(terms) > 1:
        legend(axes, list(terms))
    return to_svg(figure, name, f"Training loss over steps: {', '.join(terms)}")


def loss_terms(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Term → step → value. A step logged twice (after a resume) counts as it was logged last."""
    terms: dict[str, dict[int, float]] = {}
    for row in log:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for key, value in row.items():
            finite = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
            if key.startswith("train/") and key != "train/lr" and finite:
                terms.setdefault(key, {})[step] = float(value)
    # The first term in a chain with one: the sum says the same.
    if set(terms) == {"train/loss", "train/task"} and terms["train/loss"] == terms["train/task"]:
        del terms["train/task"]
    order = sorted(terms, key=lambda t: (t != "train/loss", t != "train/task", t))
    return {term: dict(sorted(terms[term].items())) for term in order}


def boundaries(log: Sequence[Mapping[str, Any]]) -> list[int]:
    """The first step of every experience but the first."""
    first: dict[int, int] = {}
    for row in log:
        step, experience = row.get("step"), row.get("experience")
        logged = any(str(key).startswith("train/") for key in row)
        if isinstance(step, int) and isinstance(experience, int) and logged:
            first[experience] = min(step, first.get(experience, step))
    return [first[e] for e in sorted(first)[1:]]


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points in the order of steps: means over stretches of the same number of points."""
    order = np.argsort(steps)
    steps, values = steps[order].astype(float), values[order].astype(float)
    if len(steps) <= MOST_POINTS:
        return steps, values
    length = -(-len(steps) // MOST_POINTS)
    starts = np.arange(0, len(steps), length)
    counts = np.diff(starts, append=len(steps))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts
