"""Reference runs that say what a run could have reached: made on request, once for each configuration.

* joint: one model on all data so far, from fresh weights after each experience: for intransigence.
* independent: a model for each experience alone, told which (`task_incremental`): what an experience is worth without any
  other, for transfer.
* untrained: the initial model's accuracy on every experience: where a forgetting ratio has its zero.

They are derived from the run's own configuration, with the strategy replaced, and kept in `references/` beside the runs, so
that all strategies of a sweep with the same seed share them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from clplatform.config import conf_dir, identity, untuned
from clplatform.files import read_json, write_json
from clplatform.results import Results
from clplatform.types import ClplatformError

LOCAL = {"_target_": "clplatform.tracking.local.Local", "every_n_steps": 100}
Config = dict[str, Any]
Run = Callable[[Config, Path], Results]
Untrained = Callable[[Config], list[float | None]]


def references(
    config: Config, root: Path, run: Run, untrained: Untrained, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The matrices (`joint`, `independent`), the row of the `untrained` model, and `notes` of what is missing.

    Args:
        config: the run's, resolved.
        root: where runs live; references are kept in `root/references`.
        run: makes a run: (configuration, run directory) → results.
        untrained: a configuration's accuracies before any training.
        tell: says how it goes.
    """
    found: dict[str, Any] = {"notes": []}
    for name in ("joint", "independent"):
        if [*config["strategy"]] == [name]:
            continue
        derived = derive(config, name)
        if derived is None:
            found["notes"].append(f"no reference run {name}: the stream has no task-incremental form")
            continue
        own = root / identity(derived)  # a sweep may have this very run among its own
        folder = own if is_complete(own) else root / "references" / identity(derived)
        tell(f"reference run {name}: {folder}")
        try:
            found[name] = cached(derived, folder, run).matrix
        except ClplatformError as error:
            found["notes"].append(f"no reference run {name}: {error}")
    derived = derive(config, "finetuning")
    assert derived is not None
    path = root / "references" / f"untrained-{identity(derived)}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"row": untrained(derived)})
    found["untrained"] = read_json(path)["row"]
    return found


def derive(config: Config, strategy: str) -> Config | None:
    """The configuration with the strategy replaced; None where the stream has no such form."""
    derived = copy.deepcopy(untuned(config))
    derived |= {"references": False, "tracking": LOCAL, "evaluate_every": None, "keep_models": False, "budget": {}}
    derived |= {"prompting": None}
    derived["strategy"] = yaml.safe_load((conf_dir() / "strategy" / f"{strategy}.yaml").read_text())
    if strategy == "independent":
        if "scenario" not in derived["stream"]:
            return None
        derived["stream"] |= {"scenario": "task_incremental", "blurry": None}
    return derived


def cached(config: Config, folder: Path, run: Run) -> Results:
    """The results of this configuration: read, or measured now."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # jobs that run side by side share their references
        return Results.load(folder) if is_complete(folder) else run(config, folder)


def is_complete(folder: Path) -> bool:
    path = folder / "results.json"
    return path.exists() and read_json(path)["status"] == "completed"
