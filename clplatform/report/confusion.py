"""The section of a run's report on what was taken for what."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from clplatform.report.document import Figure, Part, Section, Table
from clplatform.report.format import count, score
from clplatform.report.heatmap import MOST_NUMBERS, confusion_map
from clplatform.report.run import Run


def confusion(run: Run) -> Section:
    """The confusion matrix, summed up by experience where classes are many, and the commonest mistakes."""
    counts = read_counts(run)
    k = len(counts)
    if k == 0:
        return Section("confusion", "Confusions", [])
    names = [str(n) for n in run.part("stream").get("class_names") or []]
    names += [f"class {i}" for i in range(len(names), k)]
    sizes = [int(n) for n in run.part("stream").get("classes_per_experience") or []]
    starts = (
        list(accumulate(sizes))[:-1] if sum(sizes) == k and min(sizes) > 0 else []
    )  # else experiences share classes
    many = k > MOST_NUMBERS
    parts: list[Part] = []
    if many and starts:
        reading = (
            "What the test samples of each experience were taken for after the last one, in %; the diagonal has right "
            "answers and mistakes within an experience. A bright column: the classes of its experience swallow others."
        )
        svg = confusion_map(by_experience(counts, sizes), run.names, name="confusion-groups", what="experience")
        parts.append(Figure("Confusions between experiences", svg, reading))
    reading = (
        "Each row says what the test samples of one class were taken for after the last experience, in %; the diagonal "
        "is right, and blank is none."
    )
    if starts:
        reading += " Lines separate experiences."
    parts.append(Figure("Confusions between classes", confusion_map(counts, names, starts), reading))
    rows = mistakes(counts, names)
    if rows:
        header = ["true class", "predicted", "samples", "share of the class"]
        parts.append(Table("Commonest mistakes", header, rows, half=True))
    return Section("confusion", "Confusions", parts)


def read_counts(run: Run) -> np.ndarray:
    """The recorded counts [K, K], rows true; [0, 0] where there are none (what is broken is among `problems`)."""
    stored, none = run.results.get("confusion"), np.zeros((0, 0), dtype=np.int64)
    if not stored:
        return none
    try:
        counts: np.ndarray = np.array(stored, dtype=np.int64)
    except (TypeError, ValueError):
        counts = none
    if counts.ndim == 2 and len(set(counts.shape)) == 1 and counts.size:
        return counts
    run.problems.append("results.json: the confusion matrix is not a square of counts")
    return none


def by_experience(counts: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Counts [K, K] of classes summed to counts [T, T] of experiences that have `sizes` classes each."""
    edges = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    return np.add.reduceat(np.add.reduceat(counts, edges, axis=0), edges, axis=1)


def mistakes(counts: np.ndarray, names: list[str], most: int = 10) -> list[list[str]]:
    """The commonest: true class, predicted class, number of samples and their share of the class."""
    wrong = counts - np.diag(np.diagonal(counts))
    order = [divmod(int(i), len(counts)) for i in np.argsort(-wrong, axis=None, kind="stable")[:most]]
    return [
        [names[i], names[j], count(int(wrong[i, j])), score(wrong[i, j] / counts[i].sum())]
        for i, j in order
        if wrong[i, j] > 0
    ]
