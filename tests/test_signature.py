"""Names, types and ranges of settings, against the signature of what a page builds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Lt, MinLen

from clplatform.signature import check_arguments, check_node, find, suggest, typed
from clplatform.types import ClplatformError


def thing(
    given: object,
    *,
    rate: Annotated[float, Ge(0), Lt(1)],
    sizes: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)],
    kind: Literal["a", "b"] = "a",
    pair: tuple[float, float] | None = None,
    freeze: Literal["none"] | Annotated[int, Ge(0)] = "none",
) -> dict[str, Any]:
    return {"rate": rate}


GOOD: dict[str, Any] = {"rate": 0.5, "sizes": [3]}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rate": 0},  # an integer is a number
        {"kind": "b", "pair": [1, 2.5]},
        {"pair": None, "freeze": 3},
    ],
)
def test_what_fits_passes(values: dict[str, Any]) -> None:
    check_arguments("x", thing, {**GOOD, **values}, given={"given"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rtae": 1}, "x.rtae: there is no such setting; did you mean rate?"),
        ({"zzz": 1}, "x.zzz: there is no such setting; there is: freeze, kind, pair, rate, sizes"),
        ({"given": 1}, "x.given is set by clplatform itself: leave it out"),
        ({"rate": "???"}, "x.rate is missing: set it with x.rate=<value>"),
        ({"rate": "abc"}, "x.rate=abc: input should be a valid number"),
        ({"rate": "0.5"}, "x.rate=0.5: input should be a valid number"),  # quoted: a text
        ({"rate": True}, "x.rate=true: input should be a valid number"),
        ({"rate": None}, "x.rate=null: input should be a valid number"),
        ({"rate": -0.1}, "x.rate=-0.1: input should be greater than or equal to 0"),
        ({"rate": 1}, "x.rate=1: input should be less than 1"),
        ({"rate": float("nan")}, "x.rate=nan: input should be a finite number"),
        ({"rate": float("inf")}, "x.rate=inf: input should be a finite number"),
        ({"kind": "c"}, "x.kind=c: input should be 'a' or 'b'"),
        ({"sizes": []}, "x.sizes=[]: list should have at least 1 item, not 0"),
        ({"sizes": 3}, "x.sizes=3: input should be a list"),
        ({"sizes": [3, 0]}, "x.sizes=[3, 0]: item 2: input should be greater than or equal to 1"),
        ({"sizes": [2.5]}, "x.sizes=[2.5]: item 1: input should be a valid integer"),
        ({"pair": [1]}, "x.pair=[1]: item 2 is missing"),
        ({"freeze": "all"}, "x.freeze=all: input should be 'none'; or input should be a valid integer"),
        ({"freeze": -1}, "x.freeze=-1: input should be 'none'; or input should be greater than or equal to 0"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ClplatformError) as error:
        check_arguments("x", thing, {**GOOD, **values}, given={"given"})
    assert str(error.value) == message


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ClplatformError, match="^x.sizes is missing: set it with x.sizes=<value>$"):
        check_arguments("x", thing, {"rate": 0.5}, given={"given"})


def test_open_ended_signatures_take_more_but_not_what_is_given() -> None:
    def open_ended(*, a: int, **more: object) -> None: ...

    check_arguments("x", open_ended, {"a": 1, "b": 2}, given=set())
    with pytest.raises(ClplatformError, match="x.b is set by clplatform itself"):
        check_arguments("x", open_ended, {"a": 1, "b": 2}, given={"b"})


def test_a_node_in_a_node_is_checked_too() -> None:
    def outer(*, inner: Any) -> None: ...

    inner = {"_target_": "clplatform.memory.buffer.Buffer", "capacity": 3, "polcy": "reservoir"}
    with pytest.raises(ClplatformError, match="^x.inner.polcy: there is no such setting; did you mean policy?"):
        check_arguments("x", outer, {"inner": inner}, given=set())


def test_what_has_no_signature_or_no_readable_annotations_checks_itself() -> None:
    def unreadable(*, a: int) -> None: ...

    unreadable.__annotations__["a"] = "NoSuchName"
    check_arguments("x", unreadable, {"a": "anything"}, given=set())
    check_node("x", {"_target_": "builtins.dict", "a": 1})  # the signature of a built-in type cannot be asked for


@pytest.mark.parametrize(
    "target", ["clplatform.strategy.ewc.EWCC", "nopackage.Thing", "Thing", "math.pi", "os", "3", ""]
)
def test_a_target_must_be_a_class_or_function(target: str) -> None:
    with pytest.raises(ClplatformError) as error:
        check_node("strategy.ewc", {"_target_": target})
    assert str(error.value) == (
        f"strategy.ewc._target_={target}: there is no such class or function; give its full dotted name (is its folder "
        "on PYTHONPATH?)"
    )


def test_a_target_whose_import_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    with pytest.raises(
        ClplatformError, match=r"importing it fails \(ModuleNotFoundError: No module named 'no_such_dep"
    ):
        find("broken_module.Thing")


def test_suggestions() -> None:
    assert suggest("strenght", ["strength", "samples"]) == "; did you mean strength?"
    assert suggest("x", ["b", "a"]) == "; there is: a, b"
    assert suggest("x", []) == "; it has none"
    assert suggest("x", map(str, range(100))) == ""  # too many to list


@pytest.mark.parametrize("value", [None, True, 3, 0.5, [1, None], {"a": False}])
def test_values_are_shown_as_they_are_typed(value: Any) -> None:
    assert json.loads(typed(value)) == value
    assert typed("text") == "text"
