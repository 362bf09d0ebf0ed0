"""Notes for the report on what is not used, in the same words whatever the stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SHOWN = 3  # files that a note names


def limited(setting: str, kept: int, there: int, what: str) -> list[str]:
    """A note on what a limit leaves out; none, if that is nothing."""
    return [f"stream.{setting} keeps {kept:,} of {there:,} {what}"] if kept < there else []


def left_out(what: str, paths: Sequence[Path], folder: Path) -> list[str]:
    """A note on files of a folder that are not read, with the first names; none, if there are no such files."""
    if not paths:
        return []
    names = [path.relative_to(folder).as_posix() for path in paths[:SHOWN]] + ["…"] * (len(paths) > SHOWN)
    return [f"{what} are left out: {len(paths)} ({', '.join(names)})"]
