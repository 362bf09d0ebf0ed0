"""Which runs may be averaged: the same stream, backbone and settings, and seeds that differ."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from clplatform.report.budget import budget
from clplatform.report.details import flatten
from clplatform.report.format import NONE
from clplatform.report.run import Run

# Settings that change no numbers, or only by chance: seeds, names, places, machinery.
NEUTRAL = re.compile(
    r"^(seed|stream\.seed|stream\.class_order|name|num_workers|threads|references|evaluate_(every|samples)|keep_models)$"
    r"|^(hydra|tracking|checkpoint|experiment|protocol\.(chosen|before|selection))(\.|$)|\._tune_\.|^tuning\._target_$"
    r"|(_dir|path|folder)$"
)
# Settings that decide how much a run may see, keep and train: groups that differ in them are not on an equal footing.
BUDGET = re.compile(
    r"^(stream|backbone)\.|^(batch_size|early_stopping)$|(^|\.)(max_epochs|epochs|max_steps|limit_train_batches)$"
    r"|\.accumulate_grad_batches$"
)
# Settings that are the same as none when they are off: runs of before there were such settings do not have them.
OPTIONAL = re.compile(
    r"^(bucket_by_length|prompting|tokenizer|updates|remembered|stream\.(augment|blurry|metric_key|test_fraction)|strategy\.(adapters|inf_lora|lora_experts|o_lora)\.lr)$"
)
PATH = re.compile(r"^[^\[\]{}]*/[^\[\]{}]*$")
NUMBER = re.compile(r"^-?\d+(\.\d*)?(e[-+]?\d+)?$")
LONG_NUMBER = re.compile(r"^-?\d+\.\d{6,}(e[-+]?\d+)?$")
MEMORY = re.compile(r"\.(capacity|mem_size|memory_size|per_class)$")
# Not continual learning: they see all data, or one experience at a time. Shown, but never the best to compare with.
BOUNDS = {"joint", "cumulative", "independent"}


@dataclass
class Group:
    """Runs that differ by their seeds only; `label` says what sets them apart from the other groups.

    `own`: the settings that set it apart from other groups of its strategy; `choices`: all that may matter.
    """

    label: str
    runs: list[Run]
    own: dict[str, str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)

    @property
    def is_bound(self) -> bool:
        """Is it an upper or lower bound and no continual learner?"""
        strategies = self.runs[0].rows("strategy")
        return bool(strategies) and set(map(str, strategies)) <= BOUNDS


@dataclass
class Setting:
    """Groups that may be compared: same stream, scenario, number of experiences, metric, backbone and budget."""

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
    name = (
        f"{stream.get('name', 'unknown stream')}, {scenario}{run.without_boundaries}, {run.n_experiences} experiences"
    )
    title = f"{name}, {backbone.get('name', 'unknown backbone')}{pretrained}" + (
        "" if run.metric_name == "accuracy" else f", {run.metric_name}"
    )
    return f"{title}, {budget(run)}" if budget(run) else title


def settings(runs: Iterable[Run]) -> list[Setting]:
    """The runs in settings, and in each setting in groups."""
    by_title: dict[str, list[Run]] = {}
    for run in runs:
        by_title.setdefault(setting_title(run), []).append(run)
    return [_setting(title, members) for title, members in by_title.items()]


def _setting(title: str, runs: list[Run]) -> Setting:
    flat = dict(zip(map(id, runs), _short([_choices(run) for run in runs]), strict=True))
    by_strategy: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        by_strategy.setdefault((run.strategy, run.tuning), []).append(run)
    groups: dict[str, Group] = {}
    for (strategy, tuning), members in by_strategy.items():
        varied = _varied([flat[id(run)] for run in members])
        name = f"{strategy}, {tuning}" if tuning else strategy
        for run in members:
            own = {_brief(key, strategy): _value(flat[id(run)], key) for key in varied}
            label = f"{name} ({', '.join(f'{key}={value}' for key, value in own.items())})" if own else name
            group = groups.setdefault(label, Group(label, [], own))
            group.runs.append(run)
            group.choices = group.choices or flat[id(run)]
    shared = [key for key in _varied(list(flat.values())) if not key.startswith(("strategy.", "tuning."))]
    differences = {key: {label: _value(group.choices, key) for label, group in groups.items()} for key in shared}
    return Setting(title, runs[0].metric_name, list(groups.values()), differences)


def unequal(one: Group, other: Group) -> list[str]:
    """In what two groups are not on an equal footing: `trainer.max_epochs 10 / 5`. Nothing where a run has no
    configuration, and no memory budget where one of them keeps no samples."""
    a, b = one.choices, other.choices
    if not a or not b:
        return []
    budgeted = bool(one.runs[0].part("budget").get("unit"))  # then it says how long is trained, and not the epochs
    keys = [key for key in dict.fromkeys([*a, *b]) if BUDGET.search(key) and a.get(key) != b.get(key)]
    if budgeted:
        keys = [key for key in keys if key not in ("stream.epochs", "trainer.max_epochs")]
    if "trainer.max_epochs" in a and "trainer.max_epochs" in b:  # it rules over the stream's own
        keys = [key for key in keys if key != "stream.epochs"]
    found = [f"{key} {_value(a, key)} / {_value(b, key)}" for key in keys]
    kept = [sorted(value for key, value in choices.items() if MEMORY.search(key)) for choices in (a, b)]
    if kept[0] and kept[1] and kept[0] != kept[1]:
        found.append(f"memory {', '.join(kept[0])} / {', '.join(kept[1])}")
    return found


def _value(choices: dict[str, str], key: str) -> str:
    return choices.get(key, "not set") if choices else "not recorded"


def _choices(run: Run) -> dict[str, str]:
    # Updates are told apart by their names; that earlier data were not there, and not where the model was that knew of them.
    updates = [node.get("name") for node in run.config.get("updates") or []] or None
    config = {**run.config, "updates": updates, "remembered": run.config.get("remembered") is not None}
    # A budget is part of the setting's title, and null in older runs not even a key.
    return {
        key: value
        for key, value in flatten(config).items()
        if not (NEUTRAL.search(key) or key.startswith("budget") or (OPTIONAL.search(key) and value in (NONE, "False")))
    }


def _short(choices: list[dict[str, str]]) -> list[dict[str, str]]:
    """Values by what sets them apart: paths of one setting without the folders that all of them are in (`after_1`, `after_2`),
    long fractions with as many digits as it takes, four at least (`2134`, `308.9`)."""
    short: dict[tuple[str, str], str] = {}
    for key in _varied(choices):
        values = sorted({c[key] for c in choices if key in c})
        paths = [value for value in values if PATH.search(value)]
        if len(paths) > 1 and len({path.startswith("/") for path in paths}) == 1:
            common = os.path.commonpath(paths)
            short |= {(key, path): os.path.relpath(path, common) if common else path for path in paths}
        if any(LONG_NUMBER.search(value) for value in values):
            numbers = [value for value in values if NUMBER.search(value)]
            for digits in range(4, 18):
                written = {value: f"{float(f'{float(value):.{digits}g}'):.{max(digits, 6)}g}" for value in numbers}
                if len(set(written.values())) == len({float(value) for value in numbers}):
                    short |= {(key, value): text for value, text in written.items()}
                    break
    return [{key: short.get((key, value), value) for key, value in c.items()} for c in choices]


def _varied(choices: list[dict[str, str]]) -> list[str]:
    """Keys whose values are not all the same (a run without a configuration says nothing)."""
    known = [c for c in choices if c]
    keys = dict.fromkeys(key for c in known for key in c)
    return [key for key in keys if len({c.get(key) for c in known}) > 1]


def _brief(key: str, strategy: str) -> str:
    """`strategy.ewc.strength` → `strength` where there is one strategy."""
    return key.removeprefix(f"strategy.{strategy}.")


def sample(run: Run) -> tuple[object, ...]:
    """Which draw of chance a run is: the seed of its training, and its class order."""
    return run.results.get("seed"), run.order_seed, str(run.config.get("stream", {}).get("class_order"))


def independent(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Runs with different seeds, and repetitions of one that is already there (same training and class-order seed):
    the same experiment twice is no second sample."""
    kept: dict[tuple[object, ...], Run] = {}
    repeated = []
    for run in runs:
        key = sample(run)
        if key in kept:
            repeated.append(run)
        else:
            kept[key] = run
    return list(kept.values()), repeated
