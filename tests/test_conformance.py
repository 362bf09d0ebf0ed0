"""Every page of `conf/strategy/` is put through the conformance suite (`clplatform check`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import pytest
import torch
from strategies import NAMES

from clplatform.check.checks import CHECKS
from clplatform.check.promise import DoesNotApply
from clplatform.check.small import SMALL
from clplatform.check.subject import Subject, page


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # models this small only wait for more


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
