"""Groups compared run by run: the same seed, the same class order and the same test data, or no pair at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clplatform.metric.statistics import Paired, holm, paired
from clplatform.report.grouping import Group, Setting, sample, unequal
from clplatform.report.run import Run

USUAL = ("finetuning", "replay")  # what a paper compares with, besides the best


@dataclass(frozen=True)
class Comparison:
    """A group against a reference group. Differences are the group's value minus the reference's.

    `result` is None without a pair. `p_exact` and `p_t` are adjusted over the comparisons of the table (Holm).
    `other_data`: runs that would be a pair if they had been measured on the same data; `unequal`: budgets that differ.
    """

    group: Group
    result: Paired | None
    other_data: Sequence[str]
    unequal: Sequence[str]
    p_exact: float | None = None
    p_t: float | None = None


def references(setting: Setting) -> list[Group]:
    """The best group (bounds aside), and finetuning and replay where there is one group of each. Of two groups the best
    alone: the other way round the numbers are the same."""
    ranked = [group for group in setting.groups if not group.is_bound] or setting.groups
    found = ranked[:1]
    for name in USUAL if len(setting.groups) > 2 else ():
        named = [group for group in setting.groups if group.runs[0].rows("strategy") == [name]]
        if len(named) == 1 and named[0] not in found:
            found.append(named[0])
    return found


def comparisons(setting: Setting, reference: Group, name: str = "average_accuracy") -> list[Comparison]:
    """Every other group against the reference, on one metric."""
    found = []
    for group in setting.groups:
        if group is not reference:
            pairs, other_data = match(group, reference, name)
            own, other = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            found.append(Comparison(group, paired(own, other), other_data, unequal(group, reference)))
    # One pair alone is no test.
    tested = [c.result if c.result is not None and c.result.n > 1 else None for c in found]
    exact = holm([None if result is None else result.p_exact for result in tested])
    t = holm([None if result is None else result.p_t for result in tested])
    return [replace(c, p_exact=exact[i], p_t=t[i]) for i, c in enumerate(found)]


def match(group: Group, reference: Group, name: str) -> tuple[list[tuple[float, float]], list[str]]:
    """The values of a metric of runs with the same seed and class order, and those that saw other data."""
    partners = {sample(run): run for run in reference.runs}
    pairs, other_data = [], []
    for run in sorted(group.runs, key=lambda run: str(sample(run))):
        partner = partners.get(sample(run))
        if partner is None:
            continue
        if not same_data(run, partner):
            other_data.append(_describe(run))
        elif (x := run.metrics[name]) is not None and (y := partner.metrics[name]) is not None:
            pairs.append((x, y))
    return pairs, other_data


def gaps(setting: Setting) -> list[str]:
    """Seeds and class orders that not every group has, and which groups have them: these runs lack a partner."""
    having: dict[tuple[object, ...], list[Group]] = {}
    names: dict[tuple[object, ...], str] = {}
    for group in setting.groups:
        for run in group.runs:
            having.setdefault(sample(run), []).append(group)
            names[sample(run)] = _describe(run)
    by_groups: dict[str, list[str]] = {}
    for key, groups in having.items():
        without = [group.label for group in setting.groups if group not in groups]
        own = [group.label for group in groups]
        if without:
            where = f"only {', '.join(own)}" if len(own) <= len(without) else f"all but {', '.join(without)}"
            by_groups.setdefault(where, []).append(names[key])
    return [f"{where}: {'; '.join(sorted(seeds))}" for where, seeds in by_groups.items()]


def same_data(one: Run, other: Run) -> bool:
    """Were two runs measured on the same classes, in the same order, and on as many samples? What a run does not say is
    taken to be the same."""
    a, b = one.part("stream"), other.part("stream")
    sizes = [stream["samples"].get("test") if isinstance(stream.get("samples"), dict) else None for stream in (a, b)]
    names = [stream.get("class_names") or None for stream in (a, b)]
    return all(None in values or values[0] == values[1] for values in (sizes, names))


def _describe(run: Run) -> str:
    order = "" if run.order_seed is None else f", class order {run.order_seed}"
    return f"seed {run.results.get('seed', 'unknown')}{order}"
