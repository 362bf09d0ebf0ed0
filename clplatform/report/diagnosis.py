"""The section of a run's report on why it has forgotten, from what `clplatform diagnose` has left in `diagnosis.json`."""

from __future__ import annotations

import json
from typing import Any

from clplatform.metric.score import word
from clplatform.report import diagnosis_figures
from clplatform.report.document import Figure, Part, Points, Section, Table, Text
from clplatform.report.format import NONE, difference, percent, score
from clplatform.report.heatmap import layer_map
from clplatform.report.run import Run, number

TITLE = "Why it forgot"


def diagnosis(run: Run) -> Section:
    """What was found; of a completed run that was not diagnosed, how to find out."""
    found = read(run)
    if found is None:
        if run.status != "completed" or run.n_learned < 2 or run.config.get("remembered"):
            return Section("diagnosis", TITLE, [])
        how = f"`clplatform diagnose {run.folder}` finds out: head bias, drift of the features, and what can be relearned."
        return Section("diagnosis", TITLE, [Text(how)])
    parts: list[Part] = []
    for name, write in (("head_bias", head), ("drift", drift), ("relearning", relearning)):
        values = found.get(name)
        if not isinstance(values, dict):
            continue
        try:
            parts += [Text(f"{LEFT_OUT[name]}: {values['left_out']}.")] if "left_out" in values else write(run, values)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            run.problems.append(f"diagnosis.json: {name} cannot be read ({type(error).__name__}: {error})")
    notes = [str(note) for note in found.get("notes") or []]
    return Section("diagnosis", TITLE, [*parts, *([Points(notes)] if notes else [])])


LEFT_OUT = {"head_bias": "No head bias", "drift": "No drift of the features", "relearning": "No relearning"}


def read(run: Run) -> dict[str, Any] | None:
    """`diagnosis.json` of this run; None: it was not diagnosed, or the file is of another run or broken."""
    path = run.folder / "diagnosis.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.problems.append(f"diagnosis.json cannot be read ({error})")
        return None
    if not isinstance(values, dict) or values.get("run_id") != run.results.get("run_id"):
        run.problems.append("diagnosis.json is not of this run: diagnose it again")
        return None
    return values


# -- the head --------------------------------------------------------------------------------------------------------------


def head(run: Run, values: dict[str, Any]) -> list[Part]:
    """The head's share, and its bias."""
    names, untrained = run.names, values["untrained_refit"]
    shown = {
        "right after learning": values["old"],
        "at the end": values["now"],
        "at the end, new head": values["refit"],
    } | ({"untrained model, new head": untrained} if any(v is not None for v in untrained) else {})
    series = {label: [None if v is None else 100 * v for v in column] for label, column in shown.items()}
    reading = (
        "A new head was fitted to the frozen features of training data of all experiences alike. What the third bar is above "
        "the second was forgotten by the head alone; what it lacks to the first, the features do not tell as well any more "
        "(or it is harder among all classes)."
    )
    if len(shown) > 3:
        reading += " The last bar is what features give that never learned anything."
    svg = diagnosis_figures.bars(series, names, "test accuracy (%)", "head-bias", highest=103)
    rows = [
        [f"{k + 1} · {name}", *(score(column[k]) for column in shown.values()), _share(_at(values["shares"], k))]
        for k, name in enumerate(names)
    ]
    table = Table(
        "Accuracy with a new head, and the head's share of what was forgotten",
        ["experience", *shown, "head's share"], rows, folded=len(rows) > 12,
    )  # fmt: skip
    parts = [Text(_verdict(values)), Figure("The head's share", svg, reading, wide=True), table]
    return [*parts, _bias(values["bias"])]


def _verdict(values: dict[str, Any]) -> str:
    forgotten, recovered = number(values["forgotten"]), number(values["recovered"])
    share, control = number(values["share"]), number(values["untrained_share"])
    if forgotten is None or recovered is None or share is None:
        return "Next to nothing was forgotten on average: there are no shares of it."
    text = (
        f"On average the earlier experiences lost {difference(forgotten).removeprefix('+')}, and a new head on the final "
        f"model's features brings back {difference(recovered).removeprefix('+')}: {_share(share)} of the forgetting is the head's, the rest "
        "the representation's."
    )
    if control is not None:
        text += f" (A new head on an untrained model's features would bring back {_share(control)}: " + (
            "the data are that easy, so read the share with care.)" if control > share - 0.1 else "well below.)"
        )
    return text


def _bias(values: dict[str, Any]) -> Part:
    if "left_out" in values:
        return Text(f"No bias between old and new classes: {values['left_out']}.")
    rows = [
        ["old taken for new", percent(values["old_as_new"]), "test samples of earlier experiences that get a class of the last one"],
        ["new taken for old", percent(values["new_as_old"]), "test samples of the last experience that get an earlier class"],
        ["margin of old samples", f"{values['margin_old']:+.2f}", "mean of the best old class's logit minus the best new one's: below zero, the new ones win"],
        ["margin of new samples", f"{values['margin_new']:+.2f}", "the same; a head without bias has about the opposite of the value above"],
    ]  # fmt: skip
    rows = [[cell.replace("-", "−") if i == 1 else cell for i, cell in enumerate(row)] for row in rows]
    return Table("Bias to the newest classes", ["", "value", "what it says"], rows, prose=True)


# -- the representation ----------------------------------------------------------------------------------------------------


def drift(run: Run, values: dict[str, Any]) -> list[Part]:
    """Similarity to the model of then, and what probes read."""
    layers, names = values["layers"], run.names
    parts: list[Part] = [Text(f"{values['note'][0].upper()}{values['note'][1:]}.")] if values.get("note") else []
    if "cka_unbiased" in values:
        svg = layer_map(
            values["cka_unbiased"], layers, names[:-1], "cka",
            "Similarity of every layer's features on each experience, right after it was learned and at the end",
        )  # fmt: skip
        reading = (
            "How similar the features of an experience's test samples are at the end to those right after it was learned, "
            "in % (linear CKA, unbiased): 100 is the same but for rotation and scale, 0 has nothing in common. Similar "
            "features with a fallen accuracy point to the head."
        )
        parts.append(Figure("Drift of the features", svg, reading))
    elif values.get("missing"):
        parts.append(Text(f"No similarity to earlier models: {values['missing']}."))
    if "probe_final" not in values:
        return [*parts, Text(f"No probes: {values.get('probes_left_out', NONE)}.")]
    svg = layer_map(
        values["probe_final"], layers, names, "probes", "Accuracy of linear probes on every layer and experience"
    )
    reading = (
        "Accuracy in % of a linear classifier that was trained on this layer's features of the final model, for the "
        "experience's own classes: what is high here can still be read from the model, whatever its head says."
    )
    parts.append(Figure("Linear probes of the final model", svg, reading))
    rows = [
        [layer, *(_cell(values, name, i, k) for k in range(len(names)) for name in ("probe_then", "probe_final"))]
        for i, layer in enumerate(layers)
    ]
    header = ["layer", *(f"{name}, {when}" for name in names for when in ("then", "end"))]
    parts.append(Table("Probes right after learning and at the end, in %", header, rows, folded=True))
    if "cka_linear" in values:
        rows = [
            [layer, *(_pair(values, i, k) for k in range(len(names) - 1))] for i, layer in enumerate(layers)
        ]  # fmt: skip
        parts.append(Table("CKA, unbiased / plain", ["layer", *names[:-1]], rows, folded=True))
    return parts


def _cell(values: dict[str, Any], name: str, i: int, k: int) -> str:
    return score(number(values[name][i][k]), unit=False)


def _pair(values: dict[str, Any], i: int, k: int) -> str:
    cells = [number(values[f"cka_{kind}"][i][k]) for kind in ("unbiased", "linear")]
    return " / ".join(NONE if c is None else f"{c:.2f}".replace("-", "−") for c in cells)


# -- relearning -------------------------------------------------------------------------------------------------------------


def relearning(run: Run, values: dict[str, Any]) -> list[Part]:
    """Steps to relearn beside steps to learn."""
    found, most, level = values["experiences"], int(values["most"]), float(values["level"])
    if not found:
        return [Text("Nothing could be relearned: no experience came before the last.")]
    names = [run.names[row["experience"]] for row in found]
    kept = any(row["first_kept"] for row in found)
    columns = {
        "relearned": "again",
        **({"learned at first": "first"} if kept else {}),
        "learned from scratch": "scratch",
    }
    # Not reached within the limit: drawn up to it, and said in the table.
    series = {
        label: [row[key] if row[key] is not None else (most if f"{key}_start" in row else None) for row in found]
        for label, key in columns.items()
    }
    metric = word(run.metric_name)
    reading = (
        f"Optimizer steps of plain training on the experience's data until it is at {percent(level)} of the {metric} that it "
        f"had when it was learned (bars at {most} did not get there). Much shorter bars for relearning: the knowledge was "
        "out of reach and not lost."
    )
    svg = diagnosis_figures.bars(series, names, "steps", "relearning")
    rows = [
        [
            f"{row['experience'] + 1} · {name}",
            *(_steps(row, key, most) for key in columns.values()),
            NONE if row["savings"] is None else ("≥ " if row["at_least"] else "") + _share(row["savings"]),
        ]
        for row, name in zip(found, names, strict=True)
    ]
    caption = "Steps, and savings: the share of the steps of first learning" + (" (or from scratch)" if kept else "")
    table = Table(f"{caption} that relearning does without", ["experience", *columns, "savings"], rows, half=True)
    missing = [] if kept else [Text("Compared with learning from scratch only: the model before each experience was not "
                                    "kept (keep_models=true).")]  # fmt: skip
    return [Figure("Relearning", svg, reading), table, *missing]


def _steps(row: dict[str, Any], key: str, most: int) -> str:
    if row[key] is not None:
        return f"{row[key]:,}"
    return f"> {most:,}" if f"{key}_start" in row else NONE


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value).replace("-", "−")


def _at(values: list[Any], k: int) -> float | None:
    return number(values[k]) if k < len(values) else None
