"""Whole spans of tagged words (IOB2: `B-` begins a span of a type, `I-` goes on with it, `O` is in none), and their F1.

A span also begins at an `I-` that follows no span of its type, as in the CoNLL scripts (and seqeval's default).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
OUTSIDE = "O"
IOB2 = re.compile(r"([BI])-(.+)", re.DOTALL)


@dataclass(frozen=True)
class Scheme:
    """What classes say of spans.

    Args:
        types: the types of spans, in the order of their classes.
        type_of: int64 [K], the number of a class's type; −1: in no span.
        begins: bool [K], does it begin a span?
    """

    types: list[str]
    type_of: Numbers
    begins: NDArray[np.bool_]


def scheme(names: Sequence[str]) -> Scheme:
    """Of classes by their names in IOB2; a name of another form is in no span."""
    found = [IOB2.fullmatch(name) for name in names]
    types = list(dict.fromkeys(m[2] for m in found if m))
    type_of = [types.index(m[2]) if m else -1 for m in found]
    return Scheme(types, np.array(type_of, np.int64), np.array([bool(m and m[1] == "B") for m in found]))


def spans(labels: Numbers, first: NDArray[np.bool_], of: Scheme) -> Numbers:
    """The spans of words that stand one after another.

    Args:
        labels: [N], the classes of the words.
        first: [N], where a sentence begins.

    Returns:
        [M, 3]: first word, the word after the last one, type; in the order of the words.
    """
    kind = of.type_of[labels]
    before = np.concatenate([[-1], kind[:-1]])
    start = (kind >= 0) & (of.begins[labels] | first | (before != kind))
    at, ends = np.flatnonzero(start), np.append(np.flatnonzero(start | (kind < 0)), len(labels))
    return np.stack([at, ends[np.searchsorted(ends, at, side="right")], kind[at]], 1).astype(np.int64)


def span_f1(predicted: Numbers, true: Numbers) -> float:
    """2PR/(P+R) of spans [M, 3] and [L, 3] that are equal in all three; 0 if there are none at all."""
    shared = len(set(map(tuple, predicted.tolist())) & set(map(tuple, true.tolist())))
    return 2 * shared / max(1, len(predicted) + len(true))
