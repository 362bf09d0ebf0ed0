"""The diagnosis of a finished run: its saved models and its data are looked at again, and `RUN/diagnosis.json` says what was
found. The run itself is not changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clplatform.diagnosis.drift import probe_layers, similarity, table
from clplatform.diagnosis.head_bias import NOTHING, Readings, head_bias
from clplatform.diagnosis.layers import Reading, read, some
from clplatform.diagnosis.relearning import obstacle, savings, steps_to_reach, target_of
from clplatform.diagnosis.subject import Subject, open_run
from clplatform.files import read_json, write_json
from clplatform.learner import Learner
from clplatform.types import Experience

FILE = "diagnosis.json"
SCHEMA_VERSION = 1
PARTS = ("head_bias", "drift", "relearning")
KEEP = "the run kept its last model only; with keep_models=true a run keeps one after each experience"


def diagnose(
    run_dir: Path,
    *,
    parts: tuple[str, ...] = PARTS,
    samples: int = 1000,
    level: float = 0.9,
    steps: int | None = None,
    device: str = "cpu",
    trust: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Diagnose a finished run.

    Args:
        parts: what to find out, of `PARTS`; what an earlier diagnosis has found of the others is kept.
        samples: of each experience's training data that probes and heads are fitted to.
        level: share of the old accuracy at which an experience counts as relearned.
        steps: the most steps of relearning; None: as many as the run took for an experience, 500 at most.
        device: where models run.
        trust: see `clplatform.load`.
        tell: says how it goes.

    Returns:
        The path of `diagnosis.json`.

    Raises:
        ClplatformError: not a finished run, its data are not there or not the same, or its configuration builds what is not
            trusted.
    """
    subject = open_run(run_dir, {"samples": samples, "level": level, "steps": steps, "device": device}, trust)
    path = run_dir / FILE
    found = earlier(path, subject.results.run_id)
    if "head_bias" in parts or "drift" in parts:
        found |= {name: value for name, value in representations(subject, tell).items() if name in parts}
    if "relearning" in parts:
        found["relearning"] = relearning(subject, tell)
    write_json(
        path,
        {
            **found,
            "schema_version": SCHEMA_VERSION,
            "run_id": subject.results.run_id,
            "options": subject.options,
            "notes": subject.notes,
        },
    )
    return path


def earlier(path: Path, run_id: str) -> dict[str, Any]:
    """What was found before, of the same run."""
    try:
        values = read_json(path)
        same = values["run_id"] == run_id and values["schema_version"] == SCHEMA_VERSION
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: values[name] for name in PARTS if name in values} if same else {}


# -- features ------------------------------------------------------------------------------------------------------------


def representations(subject: Subject, tell: Callable[[str], None]) -> dict[str, Any]:
    """`head_bias` and `drift`: both look at features of all experiences."""
    final: Readings = []
    untrained: Readings = []
    rows: dict[str, list[Any]] = {name: [] for name in ("cka", "probe_final", "probe_then", "probe_untrained")}
    names: list[str] = []
    classes = subject.stream.info.problem == "classification"
    for k, experience in enumerate(subject.experiences):
        tell(f"features of experience {k + 1} of {len(subject.stream)}")
        last = k == len(subject.stream) - 1
        train, test = pair(subject, subject.learner, experience)
        names = names or list(test.layers)
        then = None if last else subject.kept(k)
        then_train, then_test = (None, None) if then is None else pair(subject, then, experience)
        rows["cka"].append(None if then_test is None else similarity(then_test, test))
        if classes:
            first = None if subject.untrained is None else pair(subject, subject.untrained, experience)
            rows["probe_final"].append(probe_layers(train, test))
            rows["probe_then"].append(
                rows["probe_final"][-1]
                if last
                else None
                if then_train is None or then_test is None
                else probe_layers(then_train, then_test)
            )
            rows["probe_untrained"].append(None if first is None else probe_layers(*first))
            final = [*final, (train.without_layers(), test.without_layers())]
            untrained = [*untrained, *([] if first is None else [tuple(r.without_layers() for r in first)])]  # type: ignore[list-item]
    return {"head_bias": head(subject, final, untrained), "drift": drift(subject, rows, names)}


def pair(subject: Subject, learner: Learner, experience: Experience) -> tuple[Reading, Reading]:
    """What a model makes of the experience's training data (some) and test data."""
    train = some(experience.train, subject.options["samples"], subject.config["seed"], experience.index)
    return read(learner, train, subject.batch_size), read(learner, experience.test, subject.batch_size)


def head(subject: Subject, final: Readings, untrained: Readings) -> dict[str, Any]:
    problem = subject.stream.info.problem
    if problem != "classification":
        return {"left_out": f"the run is of {problem}: there is no classifier of samples whose bias could be measured"}
    tasks = subject.learner.classes_of_task.cpu() if subject.stream.info.task_ids else None
    found = head_bias([e.info for e in subject.experiences], final, untrained, subject.old, tasks)
    row = zip(found["now"], subject.results.matrix[-1], strict=True)
    away = max((abs(a - b) for a, b in row if a is not None and b is not None), default=0.0)
    if away > NOTHING:
        subject.notes.append(
            f"The saved model's accuracies differ by up to {100 * away:.1f} points from those that the run has recorded: "
            "was its precision lower?"
        )
    return found


def drift(subject: Subject, rows: dict[str, list[Any]], names: list[str]) -> dict[str, Any]:
    """Tables [layer][experience]; of the last experience there is no drift."""
    found: dict[str, Any] = {"layers": names}
    if len(names) < 2:
        found["note"] = (
            "the strategy does not pass samples through the backbone as a whole: only its features are shown"
        )
    if any(rows["cka"]):
        measured = rows["cka"][:-1]
        for kind in ("linear", "unbiased"):
            of_kind = [row and {name: value[kind] for name, value in row.items()} for row in measured]
            found[f"cka_{kind}"] = table(of_kind, names)
    else:
        found["missing"] = KEEP if len(subject.stream) > 1 else "the run has one experience: nothing comes after it"
    if subject.stream.info.problem == "classification":
        for name in ("probe_final", "probe_then", "probe_untrained"):
            found[name] = table(rows[name], names)
    else:
        found["probes_left_out"] = f"the run is of {subject.stream.info.problem}: samples have no classes to probe for"
    return found


# -- relearning ------------------------------------------------------------------------------------------------------------


def relearning(subject: Subject, tell: Callable[[str], None]) -> dict[str, Any]:
    """Steps to relearn, to learn at first and to learn from scratch, for each experience but the last."""
    reason = obstacle(subject.learner, subject.stream[0])
    if reason is not None:
        return {"left_out": reason}
    most, level = subject.options["steps"], subject.options["level"]
    info, found = subject.stream.info, []
    states = {
        name: {key: value.clone() for key, value in learner.state_dict().items()}
        for name, learner in (("again", subject.learner), ("scratch", subject.untrained))
        if learner is not None
    }
    for k, experience in enumerate(subject.experiences[:-1]):
        tell(f"relearning experience {k + 1} of {len(subject.stream) - 1}")
        old = subject.old[k]
        if old is None:
            continue
        target = target_of(old, level, info.higher_is_better)
        row: dict[str, Any] = {"experience": k, "old": old, "target": target}
        for name, learner in (
            ("again", subject.learner), ("scratch", subject.untrained), ("first", subject.just_before(experience)),
        ):  # fmt: skip
            if learner is None:
                row[name] = None
                continue
            if name in states:
                learner.load_state_dict(states[name])
            row[name], start = steps_to_reach(
                learner, subject.stream, experience, target, most, subject.config["seed"], subject.batch_size
            )
            row[f"{name}_start"] = start
        row["first_kept"] = "first_start" in row
        learned = row["first"] if row["first_kept"] else row["scratch"]
        row["savings"], row["at_least"] = (
            savings(row["again"], learned, most) if "scratch_start" in row or row["first_kept"] else (None, False)
        )
        found.append(row)
    return {"level": level, "most": most, "experiences": found}
