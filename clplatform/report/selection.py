"""How the settings of a comparison were chosen: by how many trials, at what cost. A strategy that was given more is ahead by that."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from clplatform.report.document import Part, Table, Text
from clplatform.report.format import NONE, score
from clplatform.report.grouping import Group, Setting
from clplatform.report.run import number
from clplatform.tracking.tables import duration

SEARCH = "optimization_results.yaml"  # what Hydra's sweepers write that search


def selection(setting: Setting, output: Path) -> list[Part]:
    """Nothing where all settings were given.

    Args:
        output: folder of the comparison; that of a sweep where it was a search.
    """
    parts: list[Part] = []
    if (output / SEARCH).exists():
        trials = Counter(group.runs[0].strategy for group in setting.groups for _ in group.runs)
        told = ", ".join(f"{strategy} {n}" for strategy, n in trials.items())
        parts.append(
            Text(
                f"These runs are the trials of a search ({told}), which chose by the validation split ({SEARCH}); the best "
                "values here are the best of many on the test data, too high for settings chosen so."
            )
        )
        parts += _by_validation(setting)
    if any(_protocol(group) for group in setting.groups):
        rows = [[group.label, *_cells(group)] for group in setting.groups]
        header = [
            "strategy",
            "trials",
            "failed",
            "time of the trials",
            "validation, as given",
            "chosen",
            "settings chosen",
        ]
        first = next(p for group in setting.groups if (p := _protocol(group)))
        caption = (
            f"How settings were chosen: on validation data of the first {first.get('experiences', NONE)} experiences of another "
            "class order, for all seeds together"
        )
        parts.append(Table(caption, header, rows, folded=len(rows) > 20))
    return parts


def _by_validation(setting: Setting) -> list[Part]:
    """What the search saw of each group, beside what it did not see."""
    rows = []
    for group in setting.groups:
        last = [run.rows("validation_matrix")[-1] for run in group.runs if run.rows("validation_matrix")]
        known = [[value for value in row if value is not None] for row in last]
        seen = [sum(row) / len(row) for row in known if row]
        tested = [value for run in group.runs if (value := run.metrics["average_accuracy"]) is not None]
        if seen and tested:
            rows.append((sum(seen) / len(seen), sum(tested) / len(tested), group.label))
    if not rows:
        return []
    rows.sort(reverse=setting.groups[0].runs[0].higher_is_better)
    cells = [[label, score(seen, setting.metric), score(tested, setting.metric)] for seen, tested, label in rows]
    caption = "The trials, the best on validation data first"
    return [Table(caption, ["strategy", "validation", "test"], cells, folded=len(cells) > 20)]


def _protocol(group: Group) -> dict[str, Any]:
    protocol = group.runs[0].part("protocol")
    return protocol if protocol.get("name") == "tune_first" else {}


def _cells(group: Group) -> list[str]:
    protocol = _protocol(group)
    if not protocol:
        return ["none", *[NONE] * 5]
    found = protocol.get("selection") or {}
    seconds, metric = number(found.get("seconds")), str(found.get("metric", "accuracy"))
    chosen = ", ".join(f"{name.rpartition('.')[2]}={value:g}" if isinstance(value, float) else f"{name.rpartition('.')[2]}={value}"
                       for name, value in (protocol.get("chosen") or {}).items())  # fmt: skip
    return [
        str(found.get("trials", NONE)), str(found.get("failed", NONE)),
        NONE if seconds is None else duration(seconds), score(number(found.get("given")), metric),
        score(number(found.get("score")), metric), chosen or NONE,
    ]  # fmt: skip
