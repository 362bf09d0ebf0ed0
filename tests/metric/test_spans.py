"""Spans against seqeval's rules, written down by hand, and against a plain loop over words."""

from __future__ import annotations

import numpy as np
import pytest

from clplatform.metric.spans import scheme, span_f1, spans

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def of(*sentences: str) -> set[tuple[int, int, int]]:
    """Spans of sentences of tags, such as `O B-PER I-PER`."""
    tags = [tag for s in sentences for tag in s.split()]
    first = [i == 0 for s in sentences for i, _ in enumerate(s.split())]
    labels = np.array([NAMES.index(tag) for tag in tags])
    return set(map(tuple, spans(labels, np.array(first), scheme(NAMES)).tolist()))


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        (["O O"], set()),
        (["B-PER I-PER O B-LOC"], {(0, 2, 0), (3, 4, 1)}),
        (["B-PER B-PER I-PER"], {(0, 1, 0), (1, 3, 0)}),
        (["O I-PER I-PER"], {(1, 3, 0)}),  # as the CoNLL scripts have it
        (["B-PER I-LOC I-LOC O"], {(0, 1, 0), (1, 3, 1)}),
        (["B-PER I-PER", "I-PER O"], {(0, 2, 0), (2, 3, 0)}),  # not over the end of a sentence
        (["B-LOC", "B-LOC I-LOC"], {(0, 1, 1), (1, 3, 1)}),
    ],
)
def test_spans(sentences: list[str], expected: set[tuple[int, int, int]]) -> None:
    assert of(*sentences) == expected


def plain(labels: list[int], first: list[bool]) -> set[tuple[int, int, int]]:
    """One word after another."""
    found, begin, kind = set(), 0, -1
    for i, (k, starts) in enumerate(zip([*labels, 0], [*first, True], strict=True)):
        name = NAMES[k]
        own = -1 if name == "O" else ["PER", "LOC"].index(name[2:])
        if kind >= 0 and (own != kind or name[0] == "B" or starts):
            found.add((begin, i, kind))
            kind = -1
        if own >= 0 and kind < 0:
            begin, kind = i, own
    return found


def test_random_tags_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(50):
        labels, first = rng.integers(0, 5, 40), rng.random(40) < 0.2
        first[0] = True
        found = set(map(tuple, spans(labels, first, scheme(NAMES)).tolist()))
        assert found == plain(labels.tolist(), first.tolist())
        sizes |= {end - start for start, end, _ in found}
    assert sizes >= {1, 2, 3}


def test_f1_is_of_whole_spans_with_their_type() -> None:
    """By hand: of 3 found and 4 true spans 2 are the same: P = 2/3, R = 1/2, F1 = 4/7."""
    true = np.array([[0, 2, 0], [3, 4, 1], [5, 6, 0], [8, 9, 1]])
    found = np.array([[0, 2, 0], [3, 4, 0], [8, 9, 1]])  # the second is of another type
    assert span_f1(found, true) == pytest.approx(4 / 7)
    assert span_f1(true, true) == 1
    nothing = np.zeros((0, 3), np.int64)
    assert span_f1(nothing, true) == span_f1(nothing, nothing) == 0


def test_what_is_not_of_a_span_begins_none() -> None:
    found = scheme(["NOUN", "B-X", "O"])
    assert (
        found.types == ["X"] and found.type_of.tolist() == [-1, 0, -1] and found.begins.tolist() == [False, True, False]
    )
