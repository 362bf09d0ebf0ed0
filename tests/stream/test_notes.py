"""Notes on what is not used: nothing is said where nothing is left out."""

from __future__ import annotations

from pathlib import Path

from clplatform.stream.notes import left_out, limited


def test_a_limit_is_noted_where_it_leaves_something_out() -> None:
    assert limited("limit", 10_000, 29_000, "training pairs of en-de") == [
        "stream.limit keeps 10,000 of 29,000 training pairs of en-de"
    ]
    assert limited("limit", 5, 5, "rows") == []


def test_the_first_files_are_named() -> None:
    paths = [Path("a") / name for name in ("1.md", "b/2.md", "3.md", "4.md")]
    assert left_out("files", paths, Path("a")) == ["files are left out: 4 (1.md, b/2.md, 3.md, …)"]
    assert left_out("files", paths[:3], Path("a")) == ["files are left out: 3 (1.md, b/2.md, 3.md)"]
    assert left_out("files", [], Path("a")) == []
