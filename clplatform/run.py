"""One run from its configuration to its report: check, build, learn, record, show."""

from __future__ import annotations

import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clplatform.budget import budget_of, check_budget
from clplatform.config import check
from clplatform.files import atomic_write, read_json, write_json
from clplatform.results import Results
from clplatform.types import ClplatformError, Stream


def show(config: dict[str, Any], run_dir: Path, *, resume: bool = False, notices: Sequence[str] = ()) -> float | None:
    """Run, then write the report and print the tables."""
    from rich.console import Console

    from clplatform.report import write_report
    from clplatform.tracking.tables import print_matrix, print_summary

    results = complete(config, run_dir, resume=resume, notices=notices)
    report = write_report(run_dir)
    console = Console()
    metric = results.primary_metric
    print_matrix(
        results.matrix, results.stream["experience_names"], metric["name"], metric["higher_is_better"], console
    )
    print_summary(results.metrics, results.cost, report, console, metric["name"])
    return objective(read_json(run_dir / "results.json"))


def complete(config: dict[str, Any], run_dir: Path, *, resume: bool = False, notices: Sequence[str] = ()) -> Results:
    """Run, with what its configuration asks for around it: tuning before (`protocol`), reference runs after.

    Args, returns and raises as `execute`. What several runs share is kept beside them.
    """
    from clplatform.protocol.references import references
    from clplatform.protocol.tune_first import check_protocol, tune_first

    root = run_dir.parent
    check(config)
    if (config.get("protocol") or {}).get("name") == "tune_first" and "chosen" not in config["protocol"]:
        check_protocol(config)
        config, how = tune_first(config, root, partial(execute, quiet=True), partial(print, flush=True))
        notices = [*notices, how]
    results = execute(config, run_dir, resume=resume, notices=notices)
    if config.get("references"):

        def run(derived: dict[str, Any], folder: Path) -> Results:
            return complete(derived, folder, resume=(folder / "results.json").exists())

        results.references = references(config, root, run, untrained, partial(print, flush=True))
        results.notes += results.references.pop("notes")
        results.save(run_dir)
    return results


def untrained(config: dict[str, Any]) -> list[float | None]:
    """The primary metric on every experience of a model that has its whole structure and no training."""
    from clplatform.evaluate import evaluate_row, only

    with tempfile.TemporaryDirectory() as scratch:
        experiment, _, _ = assemble(config, Path(scratch), resume=False, notices=(), quiet=True)
        for experience in experiment.stream:
            experiment._seed(experience, "before")
            experiment.learner.build(experience.info)
        experiment.learner.to(experiment.device)
        row = evaluate_row(experiment.learner, experiment.stream, "test", config["eval_batch_size"])
        return only(row, experiment.stream.info.primary_metric)


def objective(results: dict[str, Any]) -> float | None:
    """Average accuracy on the validation split after the last experience, with its sign turned where lower is better;
    None without such a split."""
    row = [value for value in (results.get("validation_matrix") or [[]])[-1] if value is not None]
    sign = 1 if results["primary_metric"]["higher_is_better"] else -1
    return sign * sum(row) / len(row) if row else None


def execute(
    config: dict[str, Any], run_dir: Path, *, resume: bool = False, notices: Sequence[str] = (), quiet: bool = False
) -> Results:
    """Run, or go on with, one experiment; everything it leaves is in `run_dir`.

    Args:
        config: resolved.
        resume: go on where the run stopped.
        notices: what was changed in the configuration, for the user and the record.
        quiet: say nothing on the terminal.

    Returns:
        The completed results.

    Raises:
        ClplatformError: the configuration cannot run: refused before any training, and before anything is written.
        Exception: whatever stopped the training; `results.json` says so before it is raised.
    """
    check(config)
    check_budget(config)
    for notice in notices:
        print(f"clplatform: {notice}", file=sys.stderr)
    if not resume and (run_dir / "results.json").exists():
        raise ClplatformError(f"{run_dir} holds a run already; go on with `clplatform resume {run_dir}`")
    experiment, tracker, terminal = assemble(config, run_dir, resume=resume, notices=notices, quiet=quiet)
    from clplatform.tracking.environment import environment

    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).encode())
    if not (resume and (run_dir / "environment.json").exists()):
        write_json(run_dir / "environment.json", environment())
    results = experiment.results
    results.save(run_dir)
    (run_dir / "traceback.txt").unlink(missing_ok=True)  # of a failure from which this run goes on
    try:
        with tracker, terminal:
            experiment.run(resume=resume)
            tracker.finish("completed", {**results.metrics, **results.cost})
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        results.status = "running" if stopped else "failed"
        results.error = None if stopped else {"type": type(error).__name__, "message": str(error)}
        results.save(run_dir)
        if not stopped:
            atomic_write(run_dir / "traceback.txt", traceback.format_exc().encode())
        raise_stop(error, run_dir)
        raise
    return results


def raise_stop(error: BaseException, run_dir: Path) -> None:
    """Turn Lightning's exits at a signal into the usual ones, and say how to go on."""
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    interrupted = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
    if interrupted or isinstance(error, SIGTERMException):
        print(f"clplatform: stopped; `clplatform resume {run_dir}` goes on", file=sys.stderr)
        raise SystemExit(130 if interrupted else 143) from error


def assemble(
    config: dict[str, Any], run_dir: Path, *, resume: bool, notices: Sequence[str], quiet: bool
) -> tuple[Any, Any, Any]:
    """Build the experiment with its tracker and terminal; they are returned to be entered by the caller."""
    from clplatform import build, machine
    from clplatform.experiment import Experiment
    from clplatform.protocol.memory import MemoryLimit, with_capacities
    from clplatform.protocol.tune_first import FirstExperiences
    from clplatform.threads import set_threads
    from clplatform.tracking.observe import Observers

    chain = build.build_strategies(config)
    build.check_tuning(config, chain)
    build.check_optimizer(config)
    fitter = build.build_fitter(config)
    machine.check_trainer(fitter)
    stream = build.build_stream(config, build.build_tokenizer(config))
    if (config.get("protocol") or {}).get("name") == "trial":
        stream = FirstExperiences(stream, config["protocol"]["experiences"])
    build.check_needs(chain, stream.info, config)
    results = Results.load(run_dir) if resume else None
    capacity = capacities(config, stream, results)
    if capacity:
        config = with_capacities(config, capacity)
        chain = build.build_strategies(config)
    build.check_capacity(chain, stream.info)
    chain.check(stream.info)
    build.check_validation(config, list(stream)[len(results.timing) if results is not None else 0 :])
    learner = build.build_learner(config, stream.info, chain, augment=stream.augment if stream.augments else None)
    threads = set_threads(config["threads"], learner.backbone, config["batch_size"], learner.backbone.n_tokens)
    if results is not None and results.stream["n_experiences"] < len(stream):  # an update
        results.widen(stream_record(config, stream))
        results.notes += [note for note in stream.notes if note not in results.notes]
    if results is None:
        results = new_results(config, stream, learner)
        results.budget |= {"capacity": capacity} if capacity else {}
        results.notes += [*notices, *stream.notes, *build.tuning_notes(config)]
        results.notes += [*getattr(learner.backbone, "notes", []), f"PyTorch threads: {threads}"]
    observers = Observers(config, run_dir, results, resume=resume, quiet=quiet)
    fitter.after_batch, fitter.callbacks = observers.after_batch, observers.callbacks
    watching: list[Any] = [observers]
    if config.get("evaluate_every"):
        watching.append(continual_evaluation(config, stream, results, run_dir))
        fitter.after_batch = in_turn(observers.after_batch, watching[-1].after_batch)
    if config.get("prompting"):
        watching.append(prompting(config, stream, learner, results))
    experiment = Experiment(
        learner=learner,
        stream=stream,
        fitter=fitter,
        results=results,
        run_dir=run_dir,
        config=config,
        seed=config["seed"],
        observers=watching,
    )
    if results.budget.get("bytes") is not None:
        experiment.before_record = MemoryLimit(results.budget["bytes"], chain)
    return experiment, observers.tracker, observers.terminal


def capacities(config: dict[str, Any], stream: Stream, known: Results | None) -> dict[str, int]:
    """Strategy → the capacity that `budget.bytes` has room for; empty without such a budget. A run that goes on has it in its
    record."""
    from clplatform.protocol.memory import fit_capacity

    if budget_of(config).get("bytes") is None:
        return {}
    return fit_capacity(config, stream) if known is None else known.budget.get("capacity", {})


def continual_evaluation(config: dict[str, Any], stream: Stream, results: Results, run_dir: Path) -> Any:
    """What `evaluate_every` asks for."""
    from clplatform.diagnosis.stability_gap import ContinualEvaluation

    return ContinualEvaluation(
        every=config["evaluate_every"],
        samples=config.get("evaluate_samples"),
        stream=stream,
        results=results,
        run_dir=run_dir,
        batch_size=config["eval_batch_size"],
    )


def prompting(config: dict[str, Any], stream: Any, learner: Any, results: Results) -> Any:
    """What `prompting` asks for; the record says what was cut."""
    from clplatform.prompting.evaluation import Prompting, Questions, check_prompting
    from clplatform.prompting.task import make_tasks

    check_prompting(learner.backbone, stream.info)
    questions = [Questions(task, stream.tokenizer, stream.info.input) for task in make_tasks(config["prompting"])]
    results.notes += [note for q in questions for note in q.notes() if note not in results.notes]
    return Prompting(questions, results, config["eval_batch_size"])


def in_turn(*calls: Callable[..., None]) -> Callable[..., None]:
    """One call that makes all of them."""

    def each(*arguments: Any) -> None:
        for call in calls:
            call(*arguments)

    return each


def new_results(config: dict[str, Any], stream: Stream, learner: Any) -> Results:
    """An empty record of this run."""
    from clplatform import build
    from clplatform.tracking.environment import code_state

    parameters = list(learner.backbone.parameters())
    trained = [p for p in parameters if p.requires_grad]
    merged = "mergeable" in learner.chain.needs  # what becomes a part of the weights cannot be kept without them
    return Results(
        run_id=uuid.uuid4().hex[:12],
        seed=config["seed"],
        stream=stream_record(config, stream),
        backbone={
            "name": config["backbone"]["name"],
            "pretrained": config["backbone"].get("pretrained"),
            "source": getattr(learner.backbone, "source", None),
            "parameters": sum(p.numel() for p in parameters),
            "tuning": build.build_tuning(config).name,
            "trainable_parameters": sum(p.numel() for p in trained),
            "trainable_bytes": sum(p.numel() * p.element_size() for p in (parameters if merged else trained)),
        },
        strategy=list(config["strategy"]),
        primary_metric={"name": stream.info.primary_metric, "higher_is_better": stream.info.higher_is_better},
        code=code_state(),
        protocol={k: v for k, v in (config.get("protocol") or {}).items() if k != "before"},
        budget=budget_of(config),
    )


def stream_record(config: dict[str, Any], stream: Stream) -> dict[str, Any]:
    """What a run's record says of its stream."""
    info = stream.info
    return {
        "name": info.name,
        "scenario": info.scenario,
        "blurry": config["stream"].get("blurry"),
        "problem": info.problem,
        "n_experiences": info.n_experiences,
        "classes_per_experience": list(info.classes_per_experience),
        "class_names": list(info.class_names),
        "experience_names": [e.name for e in stream],
        "seed": info.seed,
        "samples": {
            split: [len(data) if (data := getattr(e, split)) is not None else 0 for e in stream]
            for split in ("train", "validation", "test")
        },
    }
