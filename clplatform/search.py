"""A search (`sweep=optuna`) that is called again goes on: trials that were not completed come first, then new ones."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, read_write

from clplatform.config import identity


def continue_search(config: DictConfig, base: dict[str, Any], searched: list[str]) -> int:
    """Make Optuna's sweeper take up its study. Returns how many trials are left.

    Args:
        config: Hydra's, before its sweeper is built from it; changed here.
        base: the configuration that all trials share, resolved.
        searched: the settings that a trial chooses, as typed.
    """
    import optuna  # pyright: ignore[reportMissingImports]  an extra
    from optuna.trial import TrialState  # pyright: ignore[reportMissingImports]  an extra

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.ERROR)  # we say ourselves what has failed
    sweeper = config.hydra.sweeper
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    name = sweeper.study_name or study_name(config.name, base, searched)
    study = optuna.create_study(
        study_name=name, storage=sweeper.storage, direction=sweeper.direction, load_if_exists=True
    )
    trials = study.get_trials()
    done = [key(t.params) for t in trials if t.state is TrialState.COMPLETE]
    there = {*done, *(key(t.system_attrs.get("fixed_params", {})) for t in trials if t.state is TrialState.WAITING)}
    for trial in trials:
        if trial.state is TrialState.RUNNING:  # of a call that was stopped
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and trial.params and key(trial.params) not in there:
            there.add(key(trial.params))
            study.enqueue_trial(trial.params)
    left = max(0, sweeper.n_trials - len(done))
    with read_write(config):
        sweeper.study_name, sweeper.n_trials = name, left
        if sweeper.sampler.get("seed") is not None:  # the same seed again would draw the same trials again
            sweeper.sampler.seed += len(trials)
    return left


def study_name(name: str, base: dict[str, Any], searched: list[str]) -> str:
    """Searches of other settings, or over other ranges, are other studies."""
    values = json.dumps([identity(base), sorted(searched)])
    return f"{name}-{hashlib.sha256(values.encode()).hexdigest()[:12]}"


def key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
