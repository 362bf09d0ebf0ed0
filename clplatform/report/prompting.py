"""What a language model answers to prompts of labelled tasks, before, between and after experiences."""

from __future__ import annotations

from clplatform.report.document import Section, Table, Text
from clplatform.report.format import NONE, difference, score
from clplatform.report.run import Run, number

READING = (
    "None of these tasks is trained: accuracy of the label whose words are the likeliest after a prompt (Brown et al. 2020). "
    "The last row is what learning the whole stream has changed."
)


def prompting(run: Run) -> Section:
    """A matrix of its own: rows are experiences, columns tasks; empty for a run without `prompting`."""
    found = run.part("prompting")
    columns = {
        str(task): [number(v) for v in values] for task, values in found.items() if isinstance(values, list) and values
    }
    if not columns:
        return Section("prompting", "", [])
    rows = []
    for i in range(max(map(len, columns.values()))):
        after = "before training" if i == 0 else f"{i} · {run.names[i - 1] if i <= len(run.names) else NONE}"
        rows.append([after, *(score(v[i] if i < len(v) else None, "accuracy", unit=False) for v in columns.values())])
    change = [
        None if values[0] is None or values[-1] is None else values[-1] - values[0] for values in columns.values()
    ]
    rows.append(["change", *(difference(value, "accuracy") for value in change)])
    table = Table("Accuracy by prompting in %", ["after", *columns], rows)
    return Section("prompting", "Zero- and few-shot accuracy", [Text(READING), table])
