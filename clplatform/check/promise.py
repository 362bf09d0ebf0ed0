"""How a check says what it has found."""

from __future__ import annotations


class Broken(Exception):
    """A promise is not kept; the message says which, where and why that is bad."""


class DoesNotApply(Exception):
    """There is nothing to check here; the message says why."""


def promise(kept: bool, message: str) -> None:
    if not kept:
        raise Broken(message)
