"""The later sections of a run's report: losses, cost, data, notes, reproduction, configuration."""

from __future__ import annotations

import shlex
from typing import Any

from clplatform.report import figures, loss_curve
from clplatform.report.document import Code, Figure, Part, Points, Section, Table, Text
from clplatform.report.format import NONE, count, scientific, seconds, size, words
from clplatform.report.run import Run, number

COST = {
    "seconds": "training, consolidation and evaluation",
    "steps": "optimizer steps",
    "samples": "samples seen in training steps, replayed ones included",
    "flops": "floating-point operations of the backbone in training and consolidating, teachers included",
    "peak_memory_bytes": "of the device, or of the process on a CPU",
    "extra_parameters": "parameters a strategy added to the model",
    "stored_samples": "earlier samples kept for replay",
    "buffer_bytes": "memory of what is kept",
}


def losses(run: Run) -> Section:
    """Loss terms over the steps of the run."""
    svg = loss_curve.losses(run.log)
    bad = sum(
        key.startswith("train/") for row in run.log if isinstance(odd := row.get("non_finite"), dict) for key in odd
    )
    diverged = f"{bad} logged losses are not finite (NaN or infinity): training diverged at some time."
    if svg is None:
        return Section("losses", "Training loss", [Text(diverged if bad else "No training loss was logged.")])
    terms = loss_curve.loss_terms(run.log)
    reading = (
        "The loss that was minimised and its parts, over the optimizer steps of the whole run; dashed lines mark where "
        "a new experience begins."
    )
    if max(map(len, terms.values())) > loss_curve.MOST_POINTS:
        reading += " So many steps are drawn as means over short stretches."
    parts: list[Part] = [Figure("Loss terms", svg, reading, wide=True)]
    rows = []
    for term, points in terms.items():
        values = list(points.values())
        rows.append([term.removeprefix("train/"), *(f"{v:.4g}" for v in (values[0], min(values), values[-1]))])
    parts.append(Table("Logged values of each term", ["term", "first", "lowest", "last"], rows, half=True))
    if bad:
        parts.insert(0, Text(diverged))
    return Section("losses", "Training loss", parts)


def cost(run: Run) -> Section:
    """What the run cost, and where the time went."""
    rows = []
    for key, value in run.part("cost").items():
        text = {"seconds": seconds, "flops": scientific}.get(key, size if key.endswith("_bytes") else count)
        shown = text(number(value)) if number(value) is not None else NONE if value is None else str(value)
        rows.append([words(key.removesuffix("_bytes")), shown, COST.get(key, "")])
    parts: list[Part] = []
    timing = [t if isinstance(t, dict) else {} for t in run.rows("timing")]
    timing = [{k: v for k, v in times.items() if number(v) is not None} for times in timing]
    if any(timing):
        reading = "Where the time went; a strategy that revisits old data shows bars that grow with the stream."
        parts.append(Figure("Seconds for each experience", figures.time_bars(timing), reading))
    if rows:
        parts.append(Table("Cost of the whole run", ["", "value", "what it counts"], rows, half=True, prose=True))
    if any(timing):
        phases = figures.phases(timing)
        kept = [number(value) for value in run.results.get("kept_bytes") or []]
        held = [[size(value)] for value in kept] if len(kept) == len(timing) and any(kept) else []
        names = run.names + [f"experience {i + 1}" for i in range(len(run.names), len(timing))]
        lines = [
            [
                f"{i + 1} · {names[i]}",
                *(seconds(number(t.get(p))) for p in phases),
                seconds(sum(t.values())),
                *(held[i] if held else []),
            ]
            for i, t in enumerate(timing)
        ]
        totals = [sum(t.get(p, 0.0) for t in timing) for p in phases]
        lines.append(["all", *map(seconds, totals), seconds(sum(totals)), *(held[-1] if held else [])])
        caption = "Time by experience" + (", and what is kept beside the model after it" if held else "")
        columns = ["experience", *phases, "sum", *(["kept"] if held else [])]
        parts.append(Table(caption, columns, lines, folded=len(timing) > 10))
    return Section("cost", "Cost and time", parts or [Text("No cost was recorded.")])


def data(run: Run) -> Section:
    """How many samples each experience has in each split, and its classes."""
    stream = run.part("stream")
    recorded = stream.get("samples")
    samples: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    splits = [s for s in ("train", "validation", "test") if s in samples]
    if not splits:
        return Section("data", "Data", [Text("The sizes of the splits were not recorded.")])
    names, classes = run.names, stream.get("classes_per_experience") or []
    rows = [
        [f"{i + 1} · {names[i]}", _at(classes, i), *(_at(samples[s], i) for s in splits)] for i in range(len(names))
    ]
    rows.append(["all", "", *(count(sum(filter(None, samples[s]))) for s in splits)])
    table = Table("Samples in each split", ["experience", "classes", *splits], rows, folded=len(names) > 12)
    text = "The splits do not overlap. Metrics are measured on the test data; choices may only look at validation data."
    return Section("data", "Data", [Text(text), table])


def _at(values: Any, i: int) -> str:
    return count(values[i]) if isinstance(values, list) and i < len(values) else NONE


def notes(run: Run) -> Section:
    """What the run noted about itself, and what this report could not read."""
    items = [str(note) for note in run.rows("notes")] + [f"Not readable: {p}" for p in dict.fromkeys(run.problems)]
    return Section("notes", "Notes", [Points(items)] if items else [])


def reproduce(run: Run) -> Section:
    """Command line, code and seeds."""
    command = run.environment.get("command")
    line = shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")
    code, parts = run.part("code"), []
    if line:
        parts.append(Code("Command line", line, language="sh"))
    else:
        parts.append(Text("The command line was not recorded; the configuration below says everything that was set."))
    facts = [f"clplatform {code.get('version', 'of unknown version')}"]
    if code.get("git_commit"):
        facts.append(f"git commit {code['git_commit']}")
    text = ", ".join(facts) + "."
    if code.get("dirty"):
        text += " The checkout had uncommitted changes: the commit alone does not give the same code."
    text += " The same configuration and seeds on the same machine and versions give the same numbers."
    return Section("reproduce", "How to reproduce", [*parts, Text(text)])


def setup(run: Run) -> Section:
    """Full configuration and environment."""
    parts: list[Part] = []
    if run.config_text.strip():
        parts.append(Code("Full configuration (config.yaml)", run.config_text, folded=True, language="yaml"))
    environment = dict(run.environment)
    packages = environment.pop("packages", None)
    environment.pop("command", None)
    rows = [[key, text or NONE] for key, text in flatten(environment).items()]
    if rows:
        parts.append(Table("Environment", ["", "value"], rows, folded=True, prose=True))
    if isinstance(packages, dict) and packages:
        versions = [[str(k), str(v)] for k, v in packages.items()]
        parts.append(Table("Packages", ["package", "version"], versions, folded=True, prose=True))
    return Section("setup", "Configuration and environment", parts)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries as `a.b` → text."""
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= flatten(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else NONE if value is None else str(value)
            result[f"{prefix}{key}"] = text
    return result
