"""The report of one run: what it learned, what it forgot, what it cost, and how to do it again."""

from __future__ import annotations

from clplatform.metric.matrix import METRICS, Metric, average_accuracy, average_forgetting, forgetting_per_experience
from clplatform.metric.score import is_share, word
from clplatform.metric.score import title as heading
from clplatform.report import figures
from clplatform.report.budget import facts as budget_facts
from clplatform.report.confusion import confusion
from clplatform.report.details import cost, data, losses, notes, reproduce, setup
from clplatform.report.diagnosis import diagnosis
from clplatform.report.document import Document, Figure, Headline, Part, Section, Table, Text
from clplatform.report.format import NONE, difference, metric_value, score, seconds, size, words
from clplatform.report.heatmap import matrix_map
from clplatform.report.prompting import prompting
from clplatform.report.run import Run, number
from clplatform.report.scores import other_scores, samples
from clplatform.report.stability import stability


def document(run: Run) -> Document:
    """Everything there is to say about a run."""
    sections = [
        matrix(run),
        over_time(run),
        stability(run),
        diagnosis(run),
        metrics(run),
        other_scores(run),
        prompting(run),
        samples(run),
        losses(run),
        confusion(run),
        cost(run),
        data(run),
    ]
    sections += [reproduce(run), setup(run)]
    sections.insert(-2, notes(run))  # last to be made: reading the rest may have found problems
    stream = run.part("stream")
    return Document(
        title=f"{run.strategy} on {stream.get('name', 'an unknown stream')}",
        subtitle=f"{words(str(stream.get('scenario', 'unknown scenario'))).replace(' ', '-')} continual learning"
        f"{run.without_boundaries}, "
        f"{run.n_experiences} experiences, seed {run.results.get('seed', NONE)}{run.updates}",
        status=run.status,
        banner=banner(run),
        facts=facts(run),
        headlines=headlines(run),
        sections=[section for section in sections if section.parts],
    )


def banner(run: Run) -> str:
    """What must be known before any number; empty for a completed run."""
    so_far = f"{run.n_learned} of {run.n_experiences} experiences"
    go_on = f"Go on with: clplatform resume {run.folder}"
    if run.status == "failed":
        error = run.part("error")
        reason = f"{error.get('type', 'unknown error')}: {error.get('message', 'no message')}"
        return f"This run failed after {so_far} ({reason}).\nAll numbers cover only what it learned before. {go_on}"
    if run.status == "running":
        return (
            f"This run has learned {so_far}: it is still going, or was interrupted.\nAll numbers are partial. {go_on}"
        )
    if run.status == "unknown":
        return "The record does not say whether this run was completed: treat all numbers as partial."
    return ""


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a few words each."""
    stream, backbone = run.part("stream"), run.part("backbone")
    order = run.order_seed
    classes = len(stream.get("class_names") or [])
    started = str(run.environment.get("time", "time unknown"))[:16].replace("T", " ")
    return [
        ("Stream", str(stream.get("name", NONE))),
        ("Scenario", words(str(stream.get("scenario", NONE))) + run.without_boundaries),
        ("Experiences", f"{run.n_experiences}" + (f" ({classes} classes)" if classes else "")),
        ("Strategy", run.strategy),
        ("Backbone", f"{backbone.get('name', NONE)}{_origin(backbone)}"),
        *([("Tuning", run.tuning)] if run.tuning else []),
        ("Parameters", _parameters(backbone)),
        *budget_facts(run),
        ("Seeds", f"training {run.results.get('seed', NONE)}, class order {'fixed' if order is None else order}"),
        ("Run", f"{run.results.get('run_id', NONE)}, {started}"),
    ]


def _origin(backbone: dict[str, object]) -> str:
    if not backbone.get("pretrained"):
        return ", random initialisation" if "pretrained" in backbone else ""
    # The last part of a path is the model's name; the rest is the machine's own business.
    source = str(backbone.get("source") or backbone["pretrained"]).rstrip("/")
    name = source.rsplit("/", 1)[-1] if source.startswith(("/", "~", ".")) else source
    return ", pretrained" + (f" ({name})" if name not in ("True", "") else "")


def _parameters(backbone: dict[str, object]) -> str:
    total, trainable = number(backbone.get("parameters")), number(backbone.get("trainable_parameters"))
    if total is None:
        return NONE
    stored = number(backbone.get("trainable_bytes"))
    kept = f" ({size(stored)})" if stored is not None else ""
    return f"{_short(total)}" + (f", {_short(trainable)} trainable{kept}" if trainable is not None else "")


def _short(n: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return f"{n:.0f}"


def title(metric: Metric, run: Run) -> str:
    """The metric's title with the name of the primary metric in it."""
    return metric.title.replace("accuracy", word(run.metric_name))


def meaning(metric: Metric, run: Run) -> str:
    """What the metric says, with the name of the primary metric in it."""
    return metric.meaning.replace("accuracy", word(run.metric_name))


def headlines(run: Run) -> list[Headline]:
    """The numbers that a reader wants first."""
    chosen = ["average_accuracy", "average_forgetting", "learning_accuracy", "worst_accuracy"]
    known = {metric.name: metric for metric in METRICS}
    result = []
    for name in chosen:
        value = metric_value(name, run.metrics[name], run.metric_name)
        result.append(Headline(title(known[name], run), value, meaning(known[name], run)))
    spent = number(run.part("cost").get("seconds"))
    return [*result, Headline("Time", seconds(spent), "training, consolidation and evaluation together")]


def matrix(run: Run) -> Section:
    """The accuracy matrix as heat map and table."""
    if not run.matrix:
        return Section("matrix", "Accuracy matrix", [Text("Nothing has been evaluated yet.")])
    name, names = run.metric_name, run.names
    beside = len(names) <= 8 and sum(map(len, names)) <= 36  # is there room for the table beside the heat map?
    reading = (
        "Read a column downwards to follow one experience: it starts on the diagonal, right after it was learned, and "
        "what it loses below that is forgotten. Blank cells have no meaning: the model has no output for these classes."
    )
    svg = matrix_map(run.matrix, names, name, higher_is_better=run.higher_is_better)
    rows = [
        [f"{i} · {names[i - 1]}" if i else "before training", *(score(v, name, unit=False) for v in row)]
        for i, row in enumerate(run.matrix)
    ]
    unit = " in %" if is_share(name) else ""
    table = Table(
        f"{heading(name)}{unit} on the test data of each experience (columns) after training on each (rows)",
        ["after", *names], rows, folded=len(names) > 8, half=beside,
    )  # fmt: skip
    parts = [Figure(f"Test {word(name)}{unit}", svg, reading, wide=not beside), table]
    return Section("matrix", f"{heading(name)} matrix", parts)


def over_time(run: Run) -> Section:
    """Accuracy and forgetting of each experience, and the average, while the stream goes on."""
    name, n = run.metric_name, run.n_learned
    if n == 0:
        return Section("curves", "Over time", [])
    unit = " (%)" if is_share(name) else ""
    learned = {run.names[j]: [run.matrix[i][j] if i > j else None for i in range(1, n + 1)] for j in range(n)}
    average = [average_accuracy(run.matrix[: i + 1]) for i in range(1, n + 1)]
    many, worse = n > figures.MOST_NAMED, "fall" if run.higher_is_better else "rise"
    parts: list[Part] = [
        Figure(
            f"{heading(name)} of each experience",
            figures.lines(learned, 1, name, f"test {word(name)}{unit}", "accuracy", ordered=True),
            f"Each line starts when its experience is learned; lines that {worse} are forgotten, flat lines are kept.",
            wide=many,
        ),
        Figure(
            f"Average {word(name)}",
            figures.lines({"average": average}, 1, name, f"average {word(name)}{unit}", "average"),
            "The mean over all experiences learned so far: the mean of this line is the average anytime "
            f"{word(name)}.",
        ),
    ]  # fmt: skip
    if n > 1:
        lost = forgetting_per_experience(run.matrix, run.higher_is_better)
        series = {run.names[j]: [lost[i][j] for i in range(2, n + 1)] for j in range(n - 1)}
        pp = " (pp)" if is_share(name) else ""
        svg = figures.lines(series, 2, name, f"forgetting{pp}", "forgetting", ordered=True)
        help_ = "How far each experience is below its best earlier value; below zero means better than ever before."
        parts.insert(1, Figure("Forgetting of each experience", svg, help_, wide=many))
        mean = [average_forgetting(run.matrix[: i + 1], run.higher_is_better) for i in range(2, n + 1)]
        svg = figures.lines({"average": mean}, 2, name, f"average forgetting{pp}", "average-forgetting")
        help_ = "The mean over all experiences but the newest; a strategy that forgets nothing stays at zero."
        parts.append(Figure("Average forgetting", svg, help_))
        rows = [
            [f"{i} · {run.names[i - 1]}", *(difference(v, name, unit=False) for v in lost[i][: n - 1])]
            for i in range(2, n + 1)
        ]
        parts.append(Table(f"Forgetting{pp} of each experience (columns), after training on each (rows)",
                           ["after", *run.names[: n - 1]], rows, folded=True))  # fmt: skip
    return Section("curves", "Over time", parts)


def metrics(run: Run) -> Section:
    """All metrics with their definitions."""
    rows = []
    for m in METRICS:
        # The direction of a difference is fixed; that of an average is the primary metric's own.
        turned = not run.higher_is_better and m.range == (0, 1)
        better = {"higher": "lower", "lower": "higher"}[m.better] if turned else m.better
        value = metric_value(m.name, run.metrics[m.name], run.metric_name)
        arrow = {"higher": "↑ higher", "lower": "↓ lower"}[better]
        rows.append([title(m, run), value, arrow, m.formula, m.source, meaning(m, run)])
    header = ["metric", "value", "better", "formula", "source", "meaning"]
    how = (
        "R[i,j] is the value on experience j after training on experiences 1 … i (row 0: before any training), "
        f"T = {run.n_learned} experiences learned. Every experience counts the same; empty cells do not count."
    )
    return Section("metrics", "Metrics", [Text(how), Table("All metrics", header, rows, prose=True, formulas=3)])
