"""Everything that is said of a run follows from its matrix: pure functions, numpy only.

The matrix R is a list of rows. R[i, j] is the primary metric on experience j after training on experiences
1 … i; row 0 is before any training. In formulas i and j count experiences from 1, so R[j, j] is experience j
right after it was learned (`matrix[j][j - 1]` in Python). T is the number of columns, n = rows − 1 the number of
experiences learned.

- A cell that has no meaning is None (a class-incremental head without the classes yet) and is left out, never
  counted as zero. A metric without any cell is None.
- A run in progress (n < T) is judged as a run over a stream of n experiences: only columns 1 … n count.
- Every experience counts the same, whatever its number of samples.
- Where lower is better (perplexity) the signs are turned, so that forgetting > 0 always means "got worse" and
  transfer > 0 "helped"; averages stay in the metric's own unit.

Sources: Lopez-Paz & Ranzato 2017 (GEM, arXiv:1706.08840); Chaudhry et al. 2018 (RWalk, arXiv:1801.10112);
Riemer et al. 2019 (MER, arXiv:1810.11910); Caccia et al. 2022 (ER-ACE, arXiv:2104.05025); De Lange et al. 2023
(stability gap, arXiv:2205.13452).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = Sequence[Sequence[float | None]]
Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """What a reader has to know of a metric. `better` and `range` are those of a higher-is-better primary metric
    in 0 … 1 (accuracy); where lower is better, the averages' direction turns with it, the differences' does not."""

    name: str
    title: str
    formula: str
    source: str
    better: Literal["higher", "lower"]
    range: tuple[float, float]
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric(
        "average_accuracy", "Average accuracy", "1/T · Σ_j R[T,j]", "Lopez-Paz & Ranzato 2017 (ACC)", "higher", (0, 1),
        "how well the final model does, on average over all experiences",
    ),
    Metric(
        "average_anytime_accuracy", "Average anytime accuracy", "1/T · Σ_i 1/i · Σ_{j≤i} R[i,j]",
        "Caccia et al. 2022 (AAA); average incremental accuracy of Rebuffi et al. 2017", "higher", (0, 1),
        "the average accuracy over what was learned so far, averaged over the whole stream",
    ),
    Metric(
        "average_forgetting", "Average forgetting", "1/(T−1) · Σ_{j<T} (max_{1≤i<T} R[i,j] − R[T,j])",
        "Chaudhry et al. 2018 (F)", "lower", (-1, 1),
        "how far earlier experiences fell from their best; negative: they ended better than ever before",
    ),
    Metric(
        "backward_transfer", "Backward transfer", "1/(T−1) · Σ_{j<T} (R[T,j] − R[j,j])",
        "Lopez-Paz & Ranzato 2017 (BWT)", "higher", (-1, 1),
        "what later experiences did to earlier ones; negative: they harmed them",
    ),
    Metric(
        "forward_transfer", "Forward transfer", "1/(T−1) · Σ_{j>1} (R[j−1,j] − R[0,j])",
        "Lopez-Paz & Ranzato 2017 (FWT)", "higher", (-1, 1),
        "what earlier experiences did for later ones before these were trained; undefined where the model has no "
        "output for classes it has not met",
    ),
    Metric(
        "learning_accuracy", "Learning accuracy", "1/T · Σ_j R[j,j]", "Riemer et al. 2019 (LA)", "higher", (0, 1),
        "how well each experience was learned when it was its turn",
    ),
    Metric(
        "intransigence", "Intransigence", "1/T · Σ_j (J[j,j] − R[j,j]), J: joint training",
        "Chaudhry et al. 2018 (I)", "lower", (-1, 1),
        "how much worse new experiences are learned than by joint training; needs a joint reference run",
    ),
    Metric(
        "transfer", "Transfer to new experiences", "1/T · Σ_j (R[j,j] − I[j,j]), I: a model for each experience alone",
        "Wang et al. 2024 (FWT)", "higher", (-1, 1),
        "how much better new experiences are learned than alone; needs an independent reference run, which is told the "
        "experience of every sample",
    ),
    Metric(
        "forgetting_ratio", "Forgetting ratio", "1/T · Σ_j (R[T,j] − b[j]) / (J[T,j] − b[j]) − 1, b: untrained",
        "Serrà et al. 2018 (HAT, Eq. 7)", "higher", (-math.inf, math.inf),
        "the final model between an untrained one (−1) and joint training (0); needs reference runs",
    ),
    Metric(
        "worst_accuracy", "Worst accuracy", "1/(T−1) · Σ_{j<T} min_{j<i≤T} R[i,j]",
        "De Lange et al. 2023 (min-ACC, at the ends of experiences)", "higher", (0, 1),
        "the worst accuracy that each earlier experience fell to at any time after it was learned, on average",
    ),
)  # fmt: skip


def average_accuracy(matrix: Rows) -> float | None:
    """Mean of the last row over the experiences learned: 1/T · Σ_j R[T, j].

    ACC of Lopez-Paz & Ranzato 2017. In the unit of the primary metric (accuracy: 0 … 1).
    """
    r, n = _learned(matrix)
    return _mean(r[n]) if n else None


def average_anytime_accuracy(matrix: Rows) -> float | None:
    """Mean over the stream of the average over what was learned so far: 1/T · Σ_i 1/i · Σ_{j≤i} R[i, j].

    AAA of Caccia et al. 2022; the average incremental accuracy of Rebuffi et al. 2017 (iCaRL) is the same for
    experiences of equal size. Row 0 does not count. In the unit of the primary metric (accuracy: 0 … 1).
    """
    r, n = _learned(matrix)
    rows = [_mean(r[i, :i]) for i in range(1, n + 1)]
    return _mean(np.array([np.nan if value is None else value for value in rows]))


def forgetting_per_experience(matrix: Rows, higher_is_better: bool = True) -> list[list[float | None]]:
    """Forgetting of every experience after every row, in the shape of the matrix.

    F[i, j] = max_{1≤l<i} R[l, j] − R[i, j] for j < i, else None: f_j^i of Chaudhry et al. 2018. The maximum
    leaves out row i itself, so a value below zero (better than ever before) is possible; row 0 is no training and
    does not count. Accuracy: −1 … 1.
    """
    r = _oriented(matrix, higher_is_better)
    result: list[list[float | None]] = [[None] * r.shape[1] for _ in range(r.shape[0])]
    for i in range(2, r.shape[0]):
        earlier = r[1:i, : i - 1]
        best = np.max(np.where(np.isnan(earlier), -np.inf, earlier), axis=0)
        for j, value in enumerate(best - r[i, : i - 1]):
            result[i][j] = float(value) if np.isfinite(value) else None
    return result


def average_forgetting(matrix: Rows, higher_is_better: bool = True) -> float | None:
    """Best earlier value minus final value, averaged over all experiences but the last.

    1/(T−1) · Σ_{j<T} (max_{1≤i<T} R[i, j] − R[T, j]), F of Chaudhry et al. 2018. Accuracy: −1 … 1,
    lower is better. None before two experiences are learned.
    """
    rows = forgetting_per_experience(matrix, higher_is_better)
    return _mean(np.array([value for value in rows[-1] if value is not None])) if rows else None


def backward_transfer(matrix: Rows, higher_is_better: bool = True) -> float | None:
    """Final value minus the value right after learning, averaged over all experiences but the last.

    1/(T−1) · Σ_{j<T} (R[T, j] − R[j, j]), BWT of Lopez-Paz & Ranzato 2017. Accuracy: −1 … 1, higher is better.
    Avalanche's `Forgetting` (first minus last value) is this with the sign turned. None before two experiences.
    """
    r, n = _learned(_oriented(matrix, higher_is_better))
    return _mean((r[n] - np.diagonal(r[1:]))[: n - 1]) if n > 1 else None


def forward_transfer(matrix: Rows, higher_is_better: bool = True) -> float | None:
    """Value just before an experience is learned minus the value before any training, from the second one on.

    1/(T−1) · Σ_{j>1} (R[j−1, j] − R[0, j]), FWT of Lopez-Paz & Ranzato 2017; the baseline is the random (or
    pretrained) model of row 0. Accuracy: −1 … 1, higher is better. None where it is undefined: the model cannot
    answer for classes it lacks (class-incremental, and task-incremental with a head for each task).
    """
    r, n = _learned(_oriented(matrix, higher_is_better))
    return _mean((np.diagonal(r) - r[0])[1:]) if n > 1 else None


def learning_accuracy(matrix: Rows) -> float | None:
    """Mean of the diagonal, each experience right after it was learned: 1/T · Σ_j R[j, j].

    LA of Riemer et al. 2019. In the unit of the primary metric (accuracy: 0 … 1).
    """
    r, n = _learned(matrix)
    return _mean(np.diagonal(r[1:])) if n else None


def intransigence(matrix: Rows, reference: Rows | None, higher_is_better: bool = True) -> float | None:
    """Joint training's value on a new experience minus this run's, averaged over the experiences.

    1/T · Σ_j (J[j, j] − R[j, j]): the mean of I_j of Chaudhry et al. 2018.

    Args:
        reference: the matrix J of a joint run (each row: trained from scratch on all data so far), on the same
            stream. Only experiences that both runs have learned count.

    Returns:
        Accuracy: −1 … 1, lower is better; negative: better than joint. None without a reference.

    Raises:
        ValueError: the reference has another number of experiences.
    """
    if reference is None or not len(reference):
        return None
    own, joint = (np.diagonal(_learned(_oriented(m, higher_is_better))[0][1:]) for m in (matrix, reference))
    if len(matrix) and len(matrix[0]) != len(reference[0]):
        raise ValueError(f"the reference has {len(reference[0])} experiences, the run {len(matrix[0])}")
    n = min(len(own), len(joint))
    return _mean(joint[:n] - own[:n])


def transfer(matrix: Rows, independent: Rows | None, higher_is_better: bool = True) -> float | None:
    """Value right after learning minus that of a model trained on the experience alone, averaged.

    1/T · Σ_j (R[j, j] − I[j, j]): the forward transfer of Wang et al. 2024 ("A Comprehensive Survey of Continual
    Learning", arXiv:2302.00487), over all experiences.

    Args:
        independent: the matrix I of a run with a model for each experience, on the same stream.

    Returns:
        Accuracy: −1 … 1, higher is better. None without a reference.
    """
    gap = intransigence(matrix, independent, higher_is_better)
    return None if gap is None else -gap


def forgetting_ratio(matrix: Rows, joint: Rows | None, untrained: Sequence[float | None] | None) -> float | None:
    """Where the final model is between the untrained one (−1) and joint training (0), averaged over the experiences.

    1/T · Σ_j (R[T, j] − b_j) / (J[T, j] − b_j) − 1: ρ of Serrà et al. 2018 (HAT, Eq. 7 and 8) at the end. Experiences on
    which joint training is no better than the untrained model are left out.

    Args:
        joint: the matrix J of a joint run on the same stream.
        untrained: b, the untrained model's value on every experience; None where it has no output yet: there 0.

    Returns:
        −1 … 0 as a rule, higher is better. None without references.
    """
    r, n = _learned(matrix)
    if not joint or untrained is None or n == 0 or len(joint) <= n:
        return None
    j, b = to_array(joint)[n, :n], np.array([0.0 if v is None else v for v in untrained[:n]])
    room = j - b
    ratio = np.full(n, np.nan)
    np.divide(r[n] - b, room, out=ratio, where=np.abs(room) > 1e-9)
    value = _mean(ratio)
    return None if value is None else value - 1


def worst_accuracy(matrix: Rows, higher_is_better: bool = True) -> float | None:
    """Worst value of each earlier experience at any time after it was learned, averaged: the lowest it fell to.

    1/(T−1) · Σ_{j<T} min_{j<i≤T} R[i, j]: min-ACC of De Lange et al. 2023, sampled at the ends of experiences. (Theirs
    is sampled during training too, so it can only be lower; their WC-ACC also mixes in the current experience.)
    In the unit of the primary metric (accuracy: 0 … 1). None before two experiences are learned.
    """
    r, n = _learned(_oriented(matrix, higher_is_better))
    worst = np.full(max(n - 1, 0), np.nan)
    for j in range(n - 1):
        after = r[j + 2 :, j]
        if not np.isnan(after).all():
            worst[j] = np.nanmin(after)
    value = _mean(worst)
    return value if value is None or higher_is_better else -value


def summarize(
    matrix: Rows, higher_is_better: bool = True, joint: Rows | None = None, independent: Rows | None = None,
    untrained: Sequence[float | None] | None = None,
) -> dict[str, float | None]:  # fmt: skip
    """All metrics by name, in the order of `METRICS`; works for runs in progress and for an empty matrix.

    Args:
        joint, independent: the matrices of reference runs, for `intransigence`, `transfer` and `forgetting_ratio`.
        untrained: the untrained model's value on every experience.
    """
    return {
        "average_accuracy": average_accuracy(matrix),
        "average_anytime_accuracy": average_anytime_accuracy(matrix),
        "average_forgetting": average_forgetting(matrix, higher_is_better),
        "backward_transfer": backward_transfer(matrix, higher_is_better),
        "forward_transfer": forward_transfer(matrix, higher_is_better),
        "learning_accuracy": learning_accuracy(matrix),
        "intransigence": intransigence(matrix, joint, higher_is_better),
        "transfer": transfer(matrix, independent, higher_is_better),
        "forgetting_ratio": forgetting_ratio(matrix, joint, untrained),
        "worst_accuracy": worst_accuracy(matrix, higher_is_better),
    }


def to_array(matrix: Rows) -> Array:
    """Rows as float64 [n + 1, T], None as nan.

    Raises:
        ValueError: rows of different length, or more rows than there can be.
    """
    if not len(matrix):
        return np.zeros((0, 0))
    lengths = {len(row) for row in matrix}
    if len(lengths) > 1:
        raise ValueError(f"the matrix has rows of different length: {sorted(lengths)}")
    if len(matrix) > lengths.pop() + 1:
        raise ValueError(
            f"the matrix has {len(matrix)} rows for {len(matrix[0])} experiences; at most one for each and row 0"
        )
    return np.array([[np.nan if value is None else float(value) for value in row] for row in matrix], dtype=np.float64)


def _oriented(matrix: Rows, higher_is_better: bool) -> Array:
    r = to_array(matrix)
    return r if higher_is_better else -r


def _learned(matrix: Rows | Array) -> tuple[Array, int]:
    """The matrix of the experiences learned so far [n + 1, n], and n."""
    r = matrix if isinstance(matrix, np.ndarray) else to_array(matrix)
    n = max(r.shape[0] - 1, 0)
    return r[:, :n], n


def _mean(values: Array) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None
