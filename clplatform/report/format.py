"""Numbers as people read them: accuracies in percent, their differences in percentage points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clplatform.metric.score import is_share

if TYPE_CHECKING:
    from clplatform.metric.statistics import Interval

NONE = "–"
MINUS = "−"

# Metrics that are differences of two values of the primary metric.
DIFFERENCES = {"average_forgetting", "backward_transfer", "forward_transfer", "intransigence", "transfer"}


def score(value: float | None, metric: str = "accuracy", *, unit: bool = True) -> str:
    """A value of the primary metric: `68.3 %`, or four digits of a perplexity."""
    if value is None:
        return NONE
    if is_share(metric):
        return f"{100 * value:.1f}" + (" %" if unit else "")
    return f"{value:.4g}"


def difference(value: float | None, metric: str = "accuracy", *, unit: bool = True) -> str:
    """A difference of two values, with its sign: `+25.0 pp` (percentage points)."""
    if value is None:
        return NONE
    if not is_share(metric):
        return _sign(f"{value:+.4g}")
    text = f"{100 * value:+.1f}"
    return _sign("0.0" if float(text) == 0 else text) + (" pp" if unit else "")


def metric_value(name: str, value: float | None, metric: str = "accuracy", *, unit: bool = True) -> str:
    """The value of one of `METRICS`."""
    if name == "forgetting_ratio":  # a number of its own, whatever the primary metric
        return NONE if value is None else _sign(f"{value:.2f}")
    return (difference if name in DIFFERENCES else score)(value, metric, unit=unit)


def spread(values: Sequence[float], name: str, metric: str) -> str:
    """Mean ± sample standard deviation (n − 1); the mean alone for one value."""
    if not values:
        return NONE
    mean, deviation = mean_std(values)
    text = metric_value(name, mean, metric, unit=False)
    if deviation is None:
        return text
    return f"{text} ± {metric_value('', deviation, metric, unit=False)}"


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1; None for one value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def interval(value: Interval | None, name: str, metric: str) -> str:
    """`[81.2, 86.4]`, in the unit of one of `METRICS`; `name` "difference": of two values of the primary metric."""
    if value is None:
        return NONE
    if name == "difference":
        ends = [difference(end, metric, unit=False) for end in (value.low, value.high)]
    else:
        ends = [metric_value(name, end, metric, unit=False) for end in (value.low, value.high)]
    return f"[{ends[0]}, {ends[1]}]"


def p_value(value: float | None) -> str:
    """`0.031 *`: two digits, starred where it is at most 0.05 (judged before rounding)."""
    if value is None:
        return NONE
    text = "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
    return text + (" *" if value <= 0.05 else "")


def effect(value: float | None) -> str:
    """A standardized difference with its sign: `−1.24`."""
    return NONE if value is None else _sign(f"{value:+.2f}")


def percent(value: float) -> str:
    """A share: `80 %`."""
    return f"{100 * value:.0f} %"


def seconds(value: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if value is None:
        return NONE
    if value < 10:
        return f"{value:.1f} s"
    if round(value) < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float | None) -> str:
    """Bytes: `512 B`, `1.4 MiB`."""
    if value is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, "TiB"
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def scientific(value: float | None) -> str:
    """`1.50e+12`"""
    return NONE if value is None else f"{value:.2e}"


def count(value: Any) -> str:
    """`1,797`; anything that is not a number as it is."""
    if value is None:
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def words(name: str) -> str:
    """`peak_memory_bytes` → `peak memory bytes`."""
    return name.replace("_", " ")


def shorten(text: str, length: int) -> str:
    """At most `length` characters, with an ellipsis where some are missing."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _sign(text: str) -> str:
    return text.replace("-", MINUS)
