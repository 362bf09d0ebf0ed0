"""Every page of `conf/strategy/` is put through the conformance suite (`clplatform check`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from strategies import NAMES

from clplatform.check.checks import CHECKS
from clplatform.check.promise import DoesNotApply
from clplatform.check.small import SMALL
from clplatform.check.subject import Subject, page

# What a check does not apply to: pinned, so that none is skipped unseen.
WITH_A_RESERVOIR = {"cls_er", "der", "derpp", "er_ace", "mir", "replay"}
WITH_A_MEMORY = WITH_A_RESERVOIR | {"a_gem", "bic", "der_net", "gdumb", "gem", "icarl"}
A_TASK_ONLY_ONCE = {"hat", "packnet", "pnn", "progressive_prompts"}
# Their state has no numbers after the first experience: what they keep, if anything, is in the model or comes from it.
WITHOUT_NUMBERS = {
    "adapters", "coda_prompt", "cumulative", "dualprompt", "ema_teacher", "feature_distillation", "fgm", "finetuning",
    "gradual_unfreezing", "hat", "independent", "joint", "l2p", "lfl", "linear_probe", "lora_experts", "lwf", "merge",
    "o_lora", "packnet", "pgd", "pnn", "podnet", "progressive_prompts", "seq_star", "tuning_experts",
}  # fmt: skip
WITHOUT_BOUNDARIES = {
    "a_gem", "cls_er", "cumulative", "der", "derpp", "ema_teacher", "er_ace", "fgm", "finetuning", "gdumb",
    "gradual_unfreezing", "joint", "l2_init", "linear_probe", "merge", "mir", "ncm", "pgd", "ranpac", "replay", "slda",
}  # fmt: skip
DO_NOT_APPLY: dict[str, set[str]] = {
    "acts": {"finetuning"},
    "composes": {"replay"},
    "learns_without_boundaries": {*NAMES} - WITHOUT_BOUNDARIES,
    "classes_come_back": A_TASK_ONLY_ONCE,
    "takes_updates": {"inf_lora", "seq_star"},
    "task_ids_stay_hidden": A_TASK_ONLY_ONCE | {"independent"},
    "batch_size_of_passes": WITHOUT_NUMBERS,
    "memory": {*NAMES} - WITH_A_MEMORY,
    "memory_of_text": {*NAMES} - WITH_A_MEMORY,
    "memory_is_uniform": {*NAMES} - WITH_A_RESERVOIR,
}
for check in CHECKS[1:]:  # it writes text, and the tiny worlds are of classes: see tests/strategy/test_lamol.py
    DO_NOT_APPLY.setdefault(check.__name__, set()).add("lamol")


@cache
def subject(name: str) -> Subject:
    """With its runs, which the checks share."""
    return Subject({name: {**page(name), **SMALL.get(name, {})}})


@pytest.mark.filterwarnings("ignore")  # of libraries, in runs
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_its_promise(name: str, check: Callable[[Subject], None]) -> None:
    if name in DO_NOT_APPLY.get(check.__name__, set()):
        with pytest.raises(DoesNotApply):
            check(subject(name))
    else:
        check(subject(name))


def test_only_lamol_is_left_out() -> None:
    left_out = {name: sum(name in names for names in DO_NOT_APPLY.values()) for name in NAMES}
    assert left_out.pop("lamol") == len(CHECKS) - 1
    assert max(left_out.values()) <= 7
