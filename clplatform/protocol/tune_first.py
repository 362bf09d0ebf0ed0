"""Tuning inside a job, so that every strategy, plain fine-tuning too, is tuned by the same rule before it is compared.

A trial is a run of the same configuration on the first experiences of the stream, with a seed and a class order that no
run may have. What is compared is the average accuracy on the validation split after the last of them; test data are not
there. Trials are drawn without repetition from all combinations of the learning rate's factors and of what the strategies'
pages name under `_tune_`; the first one is the configuration as given, and at equal accuracy the earlier one is taken. There
are at most `trials` of them, and fewer where there are not so many combinations: a strategy whose page names nothing to tune
has one for each factor, five by default.

The trials of a strategy do not depend on the seed of the run and are made once for all seeds, in `tuning/` beside the runs.
(Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", Sec. 2: a separate, shorter stream for choosing
hyper-parameters.)
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt

from clplatform.config import check_values, identity, untuned
from clplatform.data import derive_seed
from clplatform.files import read_json, write_json
from clplatform.metric.score import word
from clplatform.protocol.references import LOCAL, is_complete
from clplatform.report.format import score
from clplatform.results import Results
from clplatform.signature import check_node
from clplatform.types import ClplatformError, Experience, Stream

Config = dict[str, Any]
Settings = dict[str, Any]  # dotted name → value
Execute = Callable[[Config, Path], Results]

KINDS: dict[str, Any] = {
    "name": str,
    "trials": Annotated[int, Ge(1)],
    "experiences": Annotated[int, Ge(1)],
    "seed": Annotated[int, Ge(0)],
    "lr_factors": list[Annotated[float, Gt(0)]],
}
CHOSEN, BEFORE, SELECTION = "chosen", "before", "selection"  # what a tuned configuration has more in its protocol


@dataclass
class FirstExperiences:
    """The first experiences of a stream, whose validation split stands in for the test split.

    Raises:
        ClplatformError: an experience has no validation split.
    """

    stream: Stream
    n: int

    def __post_init__(self) -> None:

        kept = list(self.stream)[: self.n]
        lacking = [e.name for e in kept if e.validation is None or not len(e.validation)]
        if lacking:
            raise ClplatformError(
                f"protocol=tune_first chooses by validation data, which the experience {lacking[0]!r} lacks; give "
                "stream.validation_fraction=0.1"
            )
        self.experiences = [replace(e, test=e.validation) for e in kept]
        info, seen = self.stream.info, max(e.n_seen_classes for e in kept)
        self.info = replace(
            info,
            n_experiences=len(kept),
            classes_per_experience=info.classes_per_experience[: len(kept)],
            class_names=info.class_names[:seen],
        )
        self.notes, self.augments, self.augment = self.stream.notes, self.stream.augments, self.stream.augment
        for name in ("tokenizer", "texts", "offsets"):  # what texts are scored by
            setattr(self, name, getattr(self.stream, name, None))

    def __len__(self) -> int:
        return len(self.experiences)

    def __getitem__(self, index: int) -> Experience:
        return self.experiences[index]

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    @property
    def benchmark(self) -> Any:
        from clplatform.stream.avalanche import to_benchmark

        return to_benchmark(self)

    def save_assets(self, folder: Any) -> None:
        self.stream.save_assets(folder)


def check_protocol(config: Config) -> None:
    """Refuse a protocol that cannot be followed, before anything is built.

    Raises:
        ClplatformError: what is wrong, and what to do.
    """
    protocol = config["protocol"]
    check_values("protocol.", protocol, KINDS)
    for name, value in (("seed", config["seed"]), ("stream.seed", config["stream"].get("seed"))):
        if value == protocol["seed"]:
            raise ClplatformError(
                f"{name}={value} is the seed of the trials (protocol.seed): a run on what it was tuned on proves nothing; "
                "give another"
            )
    for strategy, node in config["strategy"].items():
        for key, values in (node.get("_tune_") or {}).items():
            path = f"strategy.{strategy}"
            if key not in node or not isinstance(values, list) or not values:
                raise ClplatformError(f"{path}._tune_.{key}: give a setting of {strategy} and a list of values to try")
            for value in values:
                check_node(path, {**node, key: value})


def tune_first(config: Config, root: Path, execute: Execute, tell: Callable[[str], None]) -> tuple[Config, str]:
    """The configuration with the settings that did best, and a sentence on how they were found.

    Args:
        config: resolved, with `protocol` tune_first.
        root: where runs live; the trials are kept in `root/tuning`.
        execute: makes a run: (configuration, run directory) → results.
        tell: says how it goes.
    """
    base = trial_base(config)
    folder = root / "tuning" / identity({**base, "protocol": untuned(config)["protocol"]})
    record = tuned_record(config, base, folder, execute, tell)
    chosen: Settings = record["chosen"]
    done = with_settings(config, chosen)
    before = {name: get(config, name) for name in chosen}
    done["protocol"] = {**config["protocol"], CHOSEN: chosen, BEFORE: before, SELECTION: selection(record)}
    return done, sentence(record, config["protocol"])


def selection(record: Config) -> dict[str, Any]:
    """What a comparison says of the trials: how many, seconds, the score of the settings as given and of those chosen."""
    trials = record["trials"]
    return {
        "trials": len(trials),
        "failed": sum(t["problem"] is not None for t in trials),
        "seconds": sum(t["seconds"] for t in trials),
        "metric": record.get("metric", "accuracy"),
        "given": None if trials[0]["problem"] else trials[0]["score"],
        "score": record["score"],
    }


def sentence(record: Config, protocol: Config) -> str:
    """For the record and the report: what was chosen, by how many trials, at what cost."""
    trials, given = record["trials"], record["trials"][0]
    seconds = sum(t["seconds"] for t in trials)
    shown = partial(score, metric=record.get("metric", "accuracy"))
    before = "the settings as given failed" if given["problem"] else f"as given: {shown(given['score'])}"
    return (
        f"Tuned first: {len(trials)} trials on the first {protocol['experiences']} experiences of another class order (seed "
        f"{protocol['seed']}), by validation {word(record.get('metric', 'accuracy'))}, {seconds:.0f} s for all seeds together; "
        f"chosen: {words(record['chosen'])} ({shown(record['score'])}; {before})"
    )


def tuned_record(config: Config, base: Config, folder: Path, execute: Execute, tell: Callable[[str], None]) -> Config:
    """What the trials have found: read, or measured now."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # jobs that run side by side share their trials
        if (folder / "tuning.json").exists():
            return read_json(folder / "tuning.json")
        candidates = draw(config)
        found: list[dict[str, Any]] = []
        for i, settings in enumerate(candidates):
            made = trial(with_settings(base, settings), folder / f"trial_{i + 1}", execute)
            found.append({"settings": settings, **asdict(made)})
            told = score(made.score, made.metric) if made.problem is None else made.problem
            tell(f"tuning {'+'.join(config['strategy'])}: trial {i + 1}/{len(candidates)} {words(settings)}: {told}")
        scores = [-math.inf if t["problem"] else (1 if t["higher_is_better"] else -1) * t["score"] for t in found]
        if max(scores) == -math.inf:
            raise ClplatformError(f"protocol=tune_first: every trial failed; the first one: {found[0]['problem']}")
        best = found[scores.index(max(scores))]
        record = {
            "trials": found,
            "chosen": best["settings"],
            "score": best["score"],
            "metric": best["metric"],
            "strategy": [*config["strategy"]],
        }
        write_json(folder / "tuning.json", record)
        return record


def trial_base(config: Config) -> Config:
    """What all trials share: it does not depend on the run's seed and class order."""
    base, protocol = copy.deepcopy(untuned(config)), config["protocol"]
    base |= {"seed": protocol["seed"], "tracking": LOCAL, "evaluate_every": None, "keep_models": False}
    base |= {"prompting": None}
    for key in ("seed", "class_order"):
        if key in base["stream"]:
            base["stream"][key] = protocol["seed"] if key == "seed" else None
    base["protocol"] = {"name": "trial", "experiences": protocol["experiences"]}
    return base


@dataclass(frozen=True)
class Trial:
    """What a trial has shown: the average at the end on the validation split, what went wrong, and seconds."""

    score: float
    problem: str | None
    seconds: float
    metric: str = "accuracy"
    higher_is_better: bool = True


def trial(config: Config, run_dir: Path, execute: Execute) -> Trial:
    """Make a trial, or read it. One that failed has no score.

    Raises:
        ClplatformError: the configuration cannot run at all.
    """
    if not is_complete(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)  # begun by a job that was stopped
        try:
            execute(config, run_dir)
        except ClplatformError:
            raise
        except Exception as error:
            return Trial(0.0, f"{type(error).__name__}: {error}", 0.0)
        for part in ("model", "checkpoints"):  # nobody will ask for them
            shutil.rmtree(run_dir / part, ignore_errors=True)
    results = Results.load(run_dir)
    row, metric = [value for value in results.matrix[-1] if value is not None], results.primary_metric
    return Trial(sum(row) / len(row), None, results.cost["seconds"], metric["name"], metric["higher_is_better"])


def draw(config: Config) -> list[Settings]:
    """The settings to try: as given, then drawn from all combinations without repetition."""
    protocol, lr = config["protocol"], config["optimizer"].get("lr")
    axes: dict[str, list[Any]] = {}
    if lr is not None:
        axes["optimizer.lr"] = [lr * factor for factor in protocol["lr_factors"]]
    for strategy, node in config["strategy"].items():
        axes |= {f"strategy.{strategy}.{key}": values for key, values in (node.get("_tune_") or {}).items()}
    given = {name: get(config, name) for name in axes}
    others = [c for values in itertools.product(*axes.values()) if (c := dict(zip(axes, values, strict=True))) != given]
    order = random.Random(derive_seed(protocol["seed"], "trials")).sample(range(len(others)), len(others))
    return [given, *(others[i] for i in order[: protocol["trials"] - 1])]


def with_settings(config: Config, settings: Settings) -> Config:
    """A copy of the configuration with these settings changed."""
    changed = copy.deepcopy(config)
    for name, value in settings.items():
        *path, key = name.split(".")
        node = changed
        for part in path:
            node = node[part]
        node[key] = value
    return changed


def get(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def words(settings: Settings) -> str:
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    )
