"""Do a page's keys and values fit the signature of what they build? Names, types and ranges, before it is called."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import pydoc
import types
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from clplatform.types import ClplatformError

# Keys that every page may have, which are not for the constructor.
OURS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_", "_tune_"}


def check_node(path: str, node: dict[str, Any], given: Iterable[str] = (), extra: Iterable[str] = ()) -> None:
    """Does the node's target exist, and do its keys and values fit the target's signature?"""
    try:
        target = find(typed(node["_target_"]))
    except ClplatformError as error:
        raise ClplatformError(f"{path}._target_={error}") from error
    values = {k: v for k, v in node.items() if k not in OURS and k not in extra}
    check_arguments(path, target, values, given=set(given))


def find(target: str) -> Any:
    """The class or function with this dotted name.

    Raises:
        ClplatformError: there is none, or importing it fails.
    """
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise ClplatformError(f"{target}: importing it fails ({type(error.value).__name__}: {error.value})") from error
    if not callable(found):
        raise ClplatformError(
            f"{target}: there is no such class or function; give its full dotted name (is its folder on PYTHONPATH?)"
        )
    return found


def check_arguments(path: str, target: Any, values: Mapping[str, Any], given: set[str]) -> None:
    """Check keyword arguments against a signature: names, what is missing, types and ranges."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a built-in function without a signature: it checks itself
        return
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = type_hints(target)
    for key, value in values.items():
        if key in given:
            raise ClplatformError(f"{path}.{key} is set by clplatform itself: leave it out")
        if key not in parameters:
            if open_ended:
                continue
            raise ClplatformError(
                f"{path}.{key}: there is no such setting{suggest(key, set(parameters) - given - {'self'})}"
            )
        if value == "???":
            raise ClplatformError(f"{path}.{key} is missing: set it with {path}.{key}=<value>")
        if isinstance(value, dict) and "_target_" in value:
            check_node(f"{path}.{key}", value)
        elif key in hints:
            check_value(f"{path}.{key}", value, hints[key])
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and name not in values and name not in given:
            raise ClplatformError(f"{path}.{name} is missing: set it with {path}.{name}=<value>")


def type_hints(target: Any) -> dict[str, Any]:
    function = target if isinstance(target, types.FunctionType) else target.__init__
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:  # a library's annotations that cannot be evaluated: it checks itself
        return {}


def check_value(path: str, value: Any, kind: Any) -> None:
    """Is `value` of this type and in its range?"""
    if isinstance(value, float) and not math.isfinite(value):
        raise ClplatformError(f"{path}={value}: input should be a finite number")
    try:
        adapter = TypeAdapter(kind, config=_pydantic_config(kind))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return  # a type that pydantic does not know: its constructor checks it
    try:
        adapter.validate_json(json.dumps(value))  # as JSON a list may be a tuple, as it must from YAML
    except ValidationError as error:
        reasons = dict.fromkeys(_reason(e["msg"], e["loc"]) for e in error.errors() if "JsonOrPython" not in e["msg"])
        raise ClplatformError(f"{path}={typed(value)}: {'; or '.join(list(reasons)[:3])}") from None


def _reason(message: str, place: tuple[int | str, ...]) -> str:
    """pydantic's message in the words of YAML, with the place in a list."""
    for theirs, ours in {
        "a valid array": "a list",
        "an object": "a group of settings",
        " after validation": "",
    }.items():
        message = message.replace(theirs, ours)
    message = message[0].lower() + message[1:]
    item = next((f"item {i + 1}" for i in place if isinstance(i, int)), None)
    if item is None:
        return message
    return f"{item} is missing" if message == "field required" else f"{item}: {message}"


def typed(value: Any) -> str:
    """A value as one types it: null, not None."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _pydantic_config(kind: Any) -> ConfigDict | None:
    # Dataclasses and typed dicts bring their own configuration.
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    try:
        TypeAdapter(kind, config=config)
    except PydanticUserError as error:
        if error.code == "type-adapter-config-unused":
            return None
        raise
    return config


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or what there is when nothing is near and there is little."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    if not names:
        return "; it has none"
    return f"; there is: {', '.join(names)}" if len(names) <= 25 else ""
