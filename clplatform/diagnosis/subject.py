"""A finished run, opened again: its record, its models and its data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clplatform.config import check_trust
from clplatform.learner import Learner
from clplatform.results import Results
from clplatform.saved import load, model_folder, read_description
from clplatform.types import ClplatformError, Experience, Stream


@dataclass
class Subject:
    """A finished run with everything that a diagnosis looks at.

    Args:
        learner: the final model.
        untrained: the model with the same structure before any training; None: it cannot be built here.
        options: `samples` of training data and for each experience, `level`, `steps`, `device`.
        notes: for the reader.
    """

    run_dir: Path
    results: Results
    config: dict[str, Any]
    stream: Stream
    learner: Learner
    untrained: Learner | None
    options: dict[str, Any]
    trust: tuple[str, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def experiences(self) -> list[Experience]:
        return list(self.stream)

    @property
    def batch_size(self) -> int:
        return self.config["eval_batch_size"]

    @property
    def old(self) -> list[float | None]:
        """The primary metric on each experience right after it was learned."""
        return [self.results.matrix[k + 1][k] for k in range(len(self.stream))]

    def kept(self, k: int) -> Learner | None:
        """The model after experience k (0-based); None: it was not kept."""
        folder = self.run_dir / "models" / f"after_{k + 1}"
        if not (folder / "clplatform.json").is_file():
            return None
        return load(folder, device=self.options["device"], trust=self.trust).learner

    def just_before(self, experience: Experience) -> Learner | None:
        """The model that the run had just before this experience, with room for it; None: it was not kept, or was
        untrained."""
        if experience.index == 0:
            return None
        learner = self.kept(experience.index - 1)
        if learner is not None:
            torch.manual_seed(self.config["seed"])  # new rows of the head
            learner.build(experience.info)
            learner.to(self.options["device"])
        return learner


def open_run(run_dir: Path, options: dict[str, Any], trust: tuple[str, ...]) -> Subject:
    """The run's record, data and models."""
    from clplatform.threads import set_threads

    if not (run_dir / "results.json").is_file() or not (run_dir / "config.yaml").is_file():
        raise ClplatformError(f"{run_dir} is not a run directory (no results.json and config.yaml in it)")
    results = Results.load(run_dir)
    if results.status != "completed":
        raise ClplatformError(f"{run_dir}: the run is not complete; finish it with `clplatform resume {run_dir}`")
    # Not config.yaml: what a run finds out before it starts (capacities of a given memory) is with its model.
    config = read_description(model_folder(run_dir) / "clplatform.json")["config"]
    check_trust(config, trust)
    learner = load(run_dir, device=options["device"], trust=trust).learner
    set_threads(config["threads"], learner.backbone, config["batch_size"], learner.backbone.n_tokens)
    stream = rebuilt(config, results)
    per_experience = max(1, round(results.cost.get("steps", 0) / len(stream)))
    options = {**options, "steps": min(500, per_experience) if options["steps"] is None else options["steps"]}
    subject = Subject(run_dir, results, config, stream, learner, None, options, trust)
    try:
        subject.untrained = blank(config, stream).to(options["device"]).eval()
    except (ClplatformError, OSError) as error:
        subject.notes.append(f"No untrained model to compare with: {error}")
    return subject


def rebuilt(config: dict[str, Any], results: Results) -> Stream:
    """The run's stream, built again.

    Raises:
        ClplatformError: its data are not there, or have changed since.
    """
    from clplatform import build

    try:
        stream = build.build_stream(config, build.build_tokenizer(config))
    except (ClplatformError, OSError) as error:
        raise ClplatformError(f"the run's data cannot be read again, which a diagnosis needs: {error}") from None
    if any(len(e.test) == 0 or len(e.train) == 0 for e in stream):
        raise ClplatformError("an experience has no test or training data: there is nothing to diagnose it by")
    then = results.stream
    now = {
        "class_names": list(stream.info.class_names),
        "experience_names": [e.name for e in stream],
        "samples": {split: [len(getattr(e, split)) for e in stream] for split in ("train", "test")},
    }
    recorded = {**then, "samples": {split: then.get("samples", {}).get(split) for split in ("train", "test")}}
    for name, value in now.items():
        if recorded.get(name) != value:
            raise ClplatformError(
                f"stream={stream.info.name} is not what the run has learned: its {name.replace('_', ' ')} differ; put the "
                "data of then where the configuration says"
            )
    return stream


def blank(config: dict[str, Any], stream: Stream) -> Learner:
    """The model before any training, with the structure of all experiences."""
    from clplatform.build import build_learner, build_strategies

    learner = build_learner(config, stream.info, build_strategies(config))
    for experience in stream:
        learner.build(experience.info)
    return learner
