"""Runs of ours that host Avalanche's plugins in the tiny world, with a head whose growing draws nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avalanche_cases import Case
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from world import TinyStream, make_experiment

from clplatform.experiment import Experiment


def stream_of(case: Case, *, texts: bool = False) -> Any:
    return (TinyTextStream if texts else TinyStream)(3, scenario=case.scenario)


def hosting(folder: Path, case: Case, *, texts: bool = False, **options: Any) -> Experiment:
    """A run with the case's plugins, before it has begun."""
    from avalanche_native import KeyedHead

    strategy = from_page("avalanche", plugins=case.nodes_for(texts), **case.changes)
    make = make_text_experiment if texts else make_experiment
    experiment = make(
        folder,
        {"avalanche": strategy},
        stream=stream_of(case, texts=texts),
        dropout=0.2,
        trainer={"max_epochs": case.epochs},
        **options,
    )
    experiment.learner.head, experiment.learner.make_head = KeyedHead(), KeyedHead
    return experiment


def hosted(experiment: Experiment) -> Any:
    """What the plugins of a run see as the strategy."""
    return experiment.learner.chain.strategies["avalanche"].host.hosted  # type: ignore[attr-defined]


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a nested state by their path."""
    if isinstance(state, dict):
        return {p: leaf for key, value in state.items() for p, leaf in flat(value, f"{path}/{key}").items()}
    return {path: state}


def model_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what the strategy has added."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith("extras.")}
