"""What is said of differences between groups: a table for each reference, and how far it may be trusted."""

from __future__ import annotations

from clplatform.metric.statistics import ALPHA, LEVEL, pairs_needed, smallest_p
from clplatform.report.document import Part, Points, Table, Text
from clplatform.report.format import NONE, difference, effect, interval, is_share, p_value, percent, words
from clplatform.report.grouping import Group, Setting
from clplatform.report.pairing import Comparison, comparisons, gaps, references

MOST_NAMED = 12  # remarks on runs without a partner; more are counted


def paired_tables(setting: Setting) -> list[Table]:
    """Every group against the best one, finetuning and replay."""
    best, *usual = references(setting)
    return [
        table(setting, reference, comparisons(setting, reference), best=reference is best)
        for reference in (best, *usual)
        if len(setting.groups) > 1
    ]


def table(setting: Setting, reference: Group, found: list[Comparison], *, best: bool) -> Table:
    """Differences, intervals, p-values and effects of all groups against one."""
    rows = []
    for c in found:
        row = [c.group.label, str(c.result.n if c.result else 0)]
        if c.result is None:
            row += [NONE] * 6
        else:
            better = c.result.superiority
            row += [
                difference(c.result.difference, setting.metric, unit=False),
                interval(c.result.interval, "difference", setting.metric),
                p_value(c.p_exact),
                p_value(c.p_t),
                effect(c.result.effect),
                percent(better if reference.runs[0].higher_is_better else 1 - better),
            ]
        rows.append([*row, "; ".join(c.unequal) or NONE])
    unit = " (percentage points)" if is_share(setting.metric) else ""
    aside = " (bounds aside)" if any(group.is_bound for group in setting.groups) else ""
    role = f", the best here{aside}" if best else ""
    header = [
        "strategy", "pairs", "difference", f"{LEVEL:.0%} interval".replace("%", " %"), "p, exact", "p, t-test",
        "effect g", "better in", "unequal",
    ]  # fmt: skip
    caption = f"Paired comparisons of average {words(setting.metric)}{unit} with {reference.label}{role}"
    # What no row has (a p-value of single pairs) is no column.
    used = [i for i in range(len(header)) if i < 3 or any(row[i] != NONE for row in rows)]
    rows = [[row[i] for i in used] for row in rows]
    return Table(caption, [header[i] for i in used], rows, folded=not best or len(rows) > 20)


def paired_parts(setting: Setting) -> list[Part]:
    """The tables, how to read them, and the runs that are in no pair."""
    tables = paired_tables(setting)
    if not tables:
        return []
    parts: list[Part] = [*tables]
    found = {reference.label: comparisons(setting, reference) for reference in references(setting)}
    parts.append(Text(_reading(found)))
    remarks = gaps(setting) + [
        f"{c.group.label} and {label}, {run}: other classes, or another number of test samples"
        for label, cs in found.items()
        for c in cs
        for run in c.other_data
    ]
    if remarks:
        items = remarks[:MOST_NAMED]
        items += [f"and {len(remarks) - len(items)} more"] if len(remarks) > len(items) else []
        parts += [
            Text("Runs that lack a partner and are in no pair with those groups (who has the seed or class order):"),
            Points(items),
        ]
    return parts


def _reading(found: dict[str, list[Comparison]]) -> str:
    """One sentence of help, and a warning where no p-value could be small enough or budgets differ."""
    text = (
        "Differences are the strategy's value minus the reference's, over runs with the same seed and class order; p-values "
        f"are two-sided and corrected over each table (Holm), * is p ≤ {ALPHA:g}; g is the mean difference in standard "
        "deviations of the differences."
    )
    tested = [c for cs in found.values() for c in cs if c.result is not None and c.p_exact is not None]
    single = [c for cs in found.values() for c in cs if c.result is not None and c.p_exact is None]
    most = max((sum(c.p_exact is not None for c in cs) for cs in found.values()), default=0)
    fewest = min((c.result.n for c in tested if c.result), default=0)
    if single:
        text += " A single pair of runs says nothing about chance."
    elif not fewest:
        text += " No two groups share a seed and class order: there is no pair to compare."
    if fewest and most * smallest_p(fewest) > ALPHA:
        n, p = pairs_needed(most), min(1.0, most * smallest_p(fewest))
        pairs = f"{fewest} pair{'s' if fewest > 1 else ''}"
        over = f" after the correction over {most} comparisons" if most > 1 else ""
        text += (
            f" Too few seeds for the exact test: with {pairs} its p cannot be below {p:.2g}{over}, whatever the difference; "
            f"it takes at least {n} pairs. The t-test can be significant, if the differences are normally distributed, "
            "which so few cannot show."
        )
    if any(c.unequal for cs in found.values() for c in cs):
        text += (
            " Unequal: budgets that differ (strategy / reference), so that the difference is not the method's alone."
        )
    return text
