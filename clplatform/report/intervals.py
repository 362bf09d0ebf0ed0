"""Confidence intervals of the means, and interquartile means."""

from __future__ import annotations

from collections.abc import Sequence

from clplatform.metric.matrix import METRICS
from clplatform.metric.statistics import (
    FEWEST_FOR_BOOTSTRAP,
    FEWEST_FOR_IQM,
    interquartile_interval,
    interquartile_mean,
    mean_interval,
)
from clplatform.report.comparison_tables import values_of
from clplatform.report.document import Table
from clplatform.report.format import NONE, interval, is_share, mean_std, metric_value, words
from clplatform.report.grouping import Setting

OF = ("average_accuracy", "average_forgetting")


def intervals(setting: Setting) -> Table | None:
    """95 % intervals of average accuracy and forgetting, and the interquartile mean; None where no group has two runs."""
    if all(len(group.runs) < 2 for group in setting.groups):
        return None
    metric = setting.metric
    with_iqm = any(len(group.runs) >= FEWEST_FOR_IQM for group in setting.groups)
    rows = []
    for group in setting.groups:
        cells = []
        for name in OF:
            values = values_of(group, name)
            cells.append(metric_value(name, mean_std(values)[0], metric, unit=False) if values else NONE)
            cells.append(interval(mean_interval(values), name, metric))
        if with_iqm:
            cells += interquartile([values_of(group, OF[0])], metric)
        rows.append([group.label, str(len(group.runs)), *cells])
    header = ["strategy", "seeds"]
    for name in OF:
        title = next(m.title for m in METRICS if m.name == name).replace("accuracy", words(metric))
        header += [title, "95 % interval"]
    header += ["IQM", "95 % interval of IQM"] if with_iqm else []
    most = max(len(group.runs) for group in setting.groups)
    how = (
        "Student's t"
        if most < FEWEST_FOR_BOOTSTRAP
        else f"Student's t, BCa bootstrap from {FEWEST_FOR_BOOTSTRAP} runs on"
    )
    iqm = f"; interquartile mean of average {words(metric)}, percentile bootstrap" if with_iqm else ""
    unit = "; % and percentage points" if is_share(metric) else ""
    return Table(f"95 % confidence intervals of the mean ({how}){iqm}{unit}", header, rows, folded=len(rows) > 20)


def interquartile(strata: Sequence[Sequence[float]], metric: str) -> list[str]:
    """IQM and its interval as two cells."""
    values = [value for part in strata for value in part]
    if len(values) < FEWEST_FOR_IQM:
        return [NONE, NONE]
    mean = metric_value(OF[0], interquartile_mean(values), metric, unit=False)
    return [mean, interval(interquartile_interval(strata), OF[0], metric)]
