"""Every planted mistake is seen by the check that is meant for it; what is right passes all."""

from __future__ import annotations

from typing import Any

import planted
import pytest

from clplatform.check import checks
from clplatform.check.command import verdicts
from clplatform.check.promise import Broken
from clplatform.check.subject import Subject


def nodes(name: str) -> dict[str, dict[str, Any]]:
    memory = {"capacity": 20} if issubclass(getattr(planted, name), planted.Replay) else {}
    return {name: {"_target_": f"planted.{name}", **memory}}


@pytest.mark.parametrize(("name", "check"), planted.PLANTED.items())
def test_a_planted_mistake_is_seen(name: str, check: str) -> None:
    # Some make a run fail, of which the command says so.
    errors = (Broken, AssertionError, KeyError) if check in ("composes", "learns_text") else Broken
    with pytest.raises(errors):
        getattr(checks, check)(Subject(nodes(name)))


@pytest.mark.parametrize("name", ["Right", "ReplayOf"])
def test_what_is_right_passes(name: str) -> None:
    assert [v for v in verdicts(nodes(name)) if v.result == "broken"] == []


def test_every_check_has_a_mistake_that_it_sees() -> None:
    assert {c.__name__ for c in checks.CHECKS} <= set(planted.PLANTED.values())
