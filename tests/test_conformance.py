"""Every page of `conf/strategy/` is put through the conformance suite (`clplatform check`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import pytest
from strategies import NAMES

from clplatform.check.checks import CHECKS
from clplatform.check.promise import DoesNotApply
from clplatform.check.small import SMALL
from clplatform.check.subject import Subject, page


@cache
def subject(name: str) -> Subject:
    """With its runs, which the checks share."""
    return Subject({name: {**page(name), **SMALL.get(name, {})}})


@pytest.mark.filterwarnings("ignore")  # of libraries, in runs
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_its_promise(name: str, check: Callable[[Subject], None]) -> None:
    with suppress(DoesNotApply):
        check(subject(name))
