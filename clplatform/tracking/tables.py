"""The tables at the end of a run. Importing this file imports neither torch nor Lightning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clplatform.metric.score import is_share, title, word
from clplatform.report.format import size

MISSING = "·"
MAX_SHOWN = 12  # a matrix with more experiences is abbreviated
# From bad to good, readable on dark and light terminals (white or black text is chosen to fit).
SCALE = ((178, 34, 52), (214, 118, 44), (196, 164, 52), (104, 160, 66), (34, 128, 84))

METRICS = {
    "average_accuracy": "Average accuracy",
    "average_anytime_accuracy": "Average anytime accuracy",
    "average_forgetting": "Average forgetting",
    "backward_transfer": "Backward transfer",
    "forward_transfer": "Forward transfer",
    "learning_accuracy": "Learning accuracy",
    "intransigence": "Intransigence",
    "transfer": "Transfer",
    "forgetting_ratio": "Forgetting ratio",
    "worst_accuracy": "Worst accuracy",
}


def print_matrix(
    matrix: Sequence[Sequence[float | None]],
    experience_names: Sequence[str],
    metric_name: str,
    higher_is_better: bool,
    console: Console,
) -> None:
    """Print the matrix as a heat map: row i after experience i (0: before any training), a column per experience.

    Args:
        matrix: see above; None where a cell has no meaning.
        experience_names: one for each column.
        metric_name: shares are shown as percentages.
        higher_is_better: the direction of the colours.
        console: where to print.
    """
    if not matrix or not matrix[0]:
        return
    tolerate(console)
    values = [v for row in matrix for v in row if v is not None and math.isfinite(v)]
    low, high = (0.0, 1.0) if is_share(metric_name) else (min(values, default=0.0), max(values, default=1.0))
    apart = not is_share(metric_name) or console.color_system is None  # colours alone keep 100.0 from 100.0
    width = max([5, *(len(cell_text(v, metric_name)) + apart for v in values)])
    room = (console.width - 16) // width
    rows = _shown(len(matrix), MAX_SHOWN + 1)
    columns = _shown(len(matrix[0]), max(3, min(MAX_SHOWN, room)))
    table = Table(title=_title(metric_name), title_justify="left", title_style="bold", box=None, padding=0)
    table.add_column("after ", no_wrap=True, min_width=6)
    for j in columns:
        table.add_column("…" if j is None else str(j + 1), justify="right", no_wrap=True, min_width=width)
    table.add_column("mean", justify="right", no_wrap=True, style="bold", min_width=max(width, 5) + 2)
    for i in rows:
        if i is None:
            table.add_row("…", *["…"] * len(columns), "…")
            continue
        row = matrix[i]
        cells = [
            Text("…") if j is None else _cell(row[j], metric_name, low, high, higher_is_better, width) for j in columns
        ]
        seen = [v for v in row[:i] if v is not None]
        mean = cell_text(sum(seen) / len(seen), metric_name) if seen else MISSING
        table.add_row("start" if i == 0 else f"{i:>2}", *cells, mean)
    console.print(table)
    console.print(_legend(experience_names, columns, console.width), highlight=False, style="dim")


def _title(metric_name: str) -> str:
    return title(metric_name) + (" in %" if is_share(metric_name) else "")


def _shown(n: int, most: int) -> list[int | None]:
    """Which of n rows or columns are shown: all, or the first and the last with a gap (None) between them."""
    if n <= most:
        return list(range(n))
    ahead = most // 2
    return [*range(ahead), None, *range(n - (most - ahead - 1), n)]


def _legend(names: Sequence[str], columns: Sequence[int | None], width: int) -> str:
    """Names of the experiences, if they say more than their numbers, in at most three lines."""
    lines, line = [], "  "
    for j in columns:
        if j is None or j >= len(names):
            continue
        name = names[j] if len(names[j]) <= 32 else names[j][:31] + "…"
        part = f"{j + 1}: {name}"
        if len(line) + len(part) + 2 > width and line.strip():
            lines.append(line.rstrip())
            line = "  "
        line += part + "   "
    lines.append(line.rstrip())
    return escape("\n".join([*lines[:3], "  …"] if len(lines) > 3 else lines))


def _cell(value: float | None, metric: str, low: float, high: float, higher_is_better: bool, width: int) -> Text:
    text = cell_text(value, metric)
    if value is None or not math.isfinite(value):
        return Text(text, style="dim")
    text = text.rjust(width)  # the colour fills the cell
    share = (value - low) / (high - low) if high > low else 1.0
    return Text(text, style=heat(share if higher_is_better else 1 - share))


def cell_text(value: float | None, metric: str = "accuracy") -> str:
    """A share as a percentage, another metric with three digits, a cell without a meaning as a dot."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f}" if is_share(metric) else f"{value:.3g}"


def heat(share: float) -> str:
    """Style of a cell by its place between the worst (0) and the best (1)."""
    position = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    i = min(int(position), len(SCALE) - 2)
    a, b = SCALE[i], SCALE[i + 1]
    red, green, blue = (round(x + (y - x) * (position - i)) for x, y in zip(a, b, strict=True))
    light = 0.3 * red + 0.59 * green + 0.11 * blue > 135
    return f"{'black' if light else 'white'} on rgb({red},{green},{blue})"


def print_summary(
    metrics: Mapping[str, float | None], cost: Mapping[str, float], report_path: Path | str | None, console: Console,
    metric_name: str = "accuracy",
) -> None:  # fmt: skip
    """Print metrics, costs and where the report is.

    Args:
        metrics: name → value (accuracies are fractions); those without a value are left out.
        cost: as in `results.json`.
        report_path: None: there is none.
        console: where to print.
        metric_name: the primary metric, of which the others are made.
    """
    tolerate(console)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    table.add_column("", justify="right", style="bold")
    table.add_column("  cost")
    table.add_column("", justify="right", style="bold")
    left = [
        (METRICS.get(name, _words(name)).replace("accuracy", word(metric_name)), _metric(name, v, metric_name))
        for name, v in metrics.items()
        if v is not None
    ]
    right = [_cost(name, value) for name, value in cost.items()]
    for i in range(max(len(left), len(right))):
        a = left[i] if i < len(left) else ("", "")
        b = right[i] if i < len(right) else ("", "")
        table.add_row(a[0], a[1], f"  {b[0]}", b[1])
    console.print(table)
    if report_path is not None:
        console.print(f"Report: {escape(str(report_path))}", highlight=False, soft_wrap=True)


def _metric(name: str, value: float, metric_name: str) -> str:
    signed = "transfer" in name
    if name in METRICS and not is_share(metric_name):
        return f"{value:+.4g}" if signed else f"{value:.4g}"
    if name in METRICS and name != "forgetting_ratio":
        return f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %"
    return f"{value:.4g}"


def _cost(name: str, value: float) -> tuple[str, str]:
    if name.endswith("bytes"):
        label = {"bytes": "Strategy's memory", "peak_memory_bytes": "Peak memory"}.get(name, _words(name[:-6]))
        return label, size(value)
    if name == "seconds" or name.endswith("_seconds"):
        return {"seconds": "Time"}.get(name, _words(name)), duration(value)
    if name == "flops":
        return "FLOPs", f"{value:.2e}"
    return _words(name), f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def duration(seconds: float) -> str:
    """`9.4 s`, `3:05 min`, `2:03:05 h`"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def tolerate(console: Console) -> Console:
    """Make a console that lacks a sign (a log in ASCII) show a question mark: no reason to lose a run at its end."""
    reconfigure = getattr(console.file, "reconfigure", None)
    if reconfigure is not None and not console.encoding.startswith("utf"):
        reconfigure(errors="replace")
    return console
