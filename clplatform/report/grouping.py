"""Which runs may be averaged: the same stream, backbone and settings, and seeds that differ."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from clplatform.report.details import flatten
from clplatform.report.run import Run

# Settings that change no numbers, or only by chance: seeds, names, places, machinery.
NEUTRAL = re.compile(
    r"^(seed|stream\.seed|stream\.class_order|name|num_workers|threads|references)$"
    r"|^(hydra|tracking|checkpoint|experiment|protocol\.(chosen|before))(\.|$)|\._tune_\.|^tuning\._target_$"
    r"|(_dir|path|folder)$"
)


@dataclass
class Group:
    """Runs that differ by their seeds only; `label` says what sets them apart from the other groups."""

    label: str
    runs: list[Run]


@dataclass
class Setting:
    """Groups that may be compared: same stream, scenario, number of experiences, metric and backbone."""

    title: str
    metric: str
    groups: list[Group]
    # Settings beside the strategy's own that differ between groups: name → label → value.
    differences: dict[str, dict[str, str]] = field(default_factory=dict)


def setting_title(run: Run) -> str:
    """What has to be the same for two runs to be compared."""
    stream, backbone = run.part("stream"), run.part("backbone")
    scenario = str(stream.get("scenario", "unknown scenario")).replace("_", "-")
    pretrained = ", pretrained" if backbone.get("pretrained") else ""
    name = f"{stream.get('name', 'unknown stream')}, {scenario}, {run.n_experiences} experiences"
    return f"{name}, {backbone.get('name', 'unknown backbone')}{pretrained}" + (
        "" if run.metric_name == "accuracy" else f", {run.metric_name}"
    )


def settings(runs: Iterable[Run]) -> list[Setting]:
    """The runs in settings, and in each setting in groups."""
    by_title: dict[str, list[Run]] = {}
    for run in runs:
        by_title.setdefault(setting_title(run), []).append(run)
    return [_setting(title, members) for title, members in by_title.items()]


def _setting(title: str, runs: list[Run]) -> Setting:
    flat = {id(run): _choices(run) for run in runs}
    by_strategy: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        by_strategy.setdefault((run.strategy, run.tuning), []).append(run)
    groups: dict[str, list[Run]] = {}
    for (strategy, tuning), members in by_strategy.items():
        varied = _varied([flat[id(run)] for run in members])
        name = f"{strategy}, {tuning}" if tuning else strategy
        for run in members:
            own = [f"{_brief(key, strategy)}={_value(flat[id(run)], key)}" for key in varied]
            label = f"{name} ({', '.join(own)})" if own else name
            groups.setdefault(label, []).append(run)
    shared = [key for key in _varied(list(flat.values())) if not key.startswith(("strategy.", "tuning."))]
    differences = {
        key: {label: _value(flat[id(members[0])], key) for label, members in groups.items()} for key in shared
    }
    ordered = [Group(label, members) for label, members in groups.items()]
    return Setting(title, runs[0].metric_name, ordered, differences)


def _value(choices: dict[str, str], key: str) -> str:
    return choices.get(key, "not set") if choices else "not recorded"


def _choices(run: Run) -> dict[str, str]:
    return {key: value for key, value in flatten(run.config).items() if not NEUTRAL.search(key)}


def _varied(choices: list[dict[str, str]]) -> list[str]:
    """Keys whose values are not all the same (a run without a configuration says nothing)."""
    known = [c for c in choices if c]
    keys = dict.fromkeys(key for c in known for key in c)
    return [key for key in keys if len({c.get(key) for c in known}) > 1]


def _brief(key: str, strategy: str) -> str:
    """`strategy.ewc.strength` → `strength` where there is one strategy."""
    return key.removeprefix(f"strategy.{strategy}.")


def independent(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Runs with different seeds, and repetitions of one that is already there (same training and class-order seed):
    the same experiment twice is no second sample."""
    kept: dict[tuple[object, ...], Run] = {}
    repeated = []
    for run in runs:
        key = (run.results.get("seed"), run.order_seed, str(run.config.get("stream", {}).get("class_order")))
        if key in kept:
            repeated.append(run)
        else:
            kept[key] = run
    return list(kept.values()), repeated
