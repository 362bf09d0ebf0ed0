"""Tables of a comparison for a paper: LaTeX with booktabs, one `table` for each, to be taken in with `\\input`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from clplatform.metric.matrix import Metric
from clplatform.report.comparison_tables import shown, values_of
from clplatform.report.document import Table
from clplatform.report.format import NONE, is_share, mean_std, metric_value, words
from clplatform.report.grouping import Group, Setting

HEADER = r"""% Written by clplatform. Take it in with \input{comparison.tex}; it needs \usepackage{booktabs}.
% Best of a column bold, second underlined; joint, cumulative and independent training are bounds and take no part."""

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---", "·": r"$\cdot$", "≤": r"$\leq$",
    "≥": r"$\geq$", "→": r"$\rightarrow$", "β": r"$\beta$", "γ": r"$\gamma$", "λ": r"$\lambda$", "μ": r"$\mu$",
    "×": r"$\times$", "χ": r"$\chi$", "²": r"$^2$", "α": r"$\alpha$", "…": r"\ldots{}", "’": "'", "\"": "''",
}  # fmt: skip


def escape(text: str) -> str:
    """Text that LaTeX shows as it is; what its default encoding lacks loses its accents or becomes `?`."""
    return "".join(SPECIAL.get(c) or _plain(c) for c in " ".join(text.split()))


def _plain(character: str) -> str:
    if character.isascii() or ("À" <= character <= "ÿ" and character.isalpha() and character not in "ÐÞðþ"):
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return escape(plain) if plain else "?"


def averages_tex(setting: Setting, name: str) -> str:
    """Mean ± standard deviation of every group and metric, the best of a column bold and the second underlined."""
    metrics = shown(setting)
    learners = [group for group in setting.groups if not group.is_bound]
    bounds = [group for group in setting.groups if group.is_bound]
    best = [_places(learners, metric, setting) for metric in metrics]
    lines = [_row(group, metrics, best, setting) for group in learners]
    if bounds:
        lines += [r"\midrule"] if learners else []
        lines += [_row(group, metrics, best, setting) for group in bounds]
    titles = [metric.title.replace("accuracy", words(setting.metric)) for metric in metrics]
    unit = " in percent, differences in percentage points," if is_share(setting.metric) else ""
    caption = f"{setting.title}: mean ± standard deviation{unit} over runs with different seeds."
    return table_tex(["Strategy", "Runs", *titles], lines, caption, name)


def plain_tex(table: Table, name: str) -> str:
    """A table of the report as it is."""
    lines = [f"{' & '.join(_cell(cell) for cell in row)} \\\\" for row in table.rows]
    header = [cell if cell.startswith("p,") else cell[:1].upper() + cell[1:] for cell in table.header]
    return table_tex(header, lines, f"{table.caption}.", name)


def table_tex(header: Sequence[str], lines: Sequence[str], caption: str, name: str) -> str:
    """A `table` with rows that are LaTeX already; long column titles are set in two lines."""
    titles = " & ".join(_title(title) if i else escape(title) for i, title in enumerate(header))
    body = "\n".join(lines)
    return rf"""\begin{{table}}[t]
\centering
\caption{{{escape(caption)}}}
\label{{tab:{name}}}
\footnotesize
\setlength{{\tabcolsep}}{{4pt}}
\begin{{tabular}}{{@{{}}l{"r" * (len(header) - 1)}@{{}}}}
\toprule
{titles} \\
\midrule
{body}
\bottomrule
\end{{tabular}}
\end{{table}}
"""


def _title(title: str) -> str:
    """A column's title, broken near its middle where it is long."""
    parts = title.split(" ")
    if len(title) <= 12 or len(parts) == 1:
        return escape(title)
    cut = min(range(1, len(parts)), key=lambda i: abs(len(" ".join(parts[:i])) - len(title) / 2))
    first, second = " ".join(parts[:cut]), " ".join(parts[cut:])
    return rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{escape(first)}\\{escape(second)}\end{{tabular}}"


def _row(group: Group, metrics: Sequence[Metric], best: Sequence[dict[str, int]], setting: Setting) -> str:
    cells = []
    for metric, places in zip(metrics, best, strict=True):
        values = values_of(group, metric.name)
        if not values:
            cells.append("--")
            continue
        mean, deviation = mean_std(values)
        text = _number(metric_value(metric.name, mean, setting.metric, unit=False))
        place = 0 if group.is_bound else places.get(text, 0)
        text = {0: text, 1: rf"\mathbf{{{text}}}", 2: rf"\underline{{{text}}}"}[place]
        spread = (
            "" if deviation is None else rf" \pm {_number(metric_value('', deviation, setting.metric, unit=False))}"
        )
        cells.append(f"${text}{spread}$")
    return f"{escape(group.label)} & {len(group.runs)} & {' & '.join(cells)} \\\\"


def _places(groups: Sequence[Group], metric: Metric, setting: Setting) -> dict[str, int]:
    """Which numbers, as they are written, are the best (1) and the second best (2): what reads the same is as good. None
    with one group."""
    means = [mean_std(values)[0] for group in groups if (values := values_of(group, metric.name))]
    if len(means) < 2:
        return {}
    up = higher_is_better(metric, setting)
    written = dict.fromkeys(
        _number(metric_value(metric.name, mean, setting.metric, unit=False)) for mean in sorted(means, reverse=up)
    )
    return {text: place for place, text in enumerate(list(written)[:2], start=1)}


def higher_is_better(metric: Metric, setting: Setting) -> bool:
    """Of a metric over this setting's primary metric: only averages, which are in its unit, turn with its direction."""
    if metric.range == (0, 1) and setting.groups and not setting.groups[0].runs[0].higher_is_better:
        return False
    return metric.better == "higher"


def _number(text: str) -> str:
    return text.replace("−", "-")


def _cell(text: str) -> str:
    """Numbers in math mode, anything else escaped."""
    if text == NONE:
        return "--"
    numeric = re.fullmatch(r"[−+\[\]\d.,e ±<*]+", text) and any(c.isdigit() for c in text)
    if not numeric:
        return escape(text)
    body = _number(text).replace("±", r"\pm").replace(",", "{,}").replace(" *", "^{*}").replace("{,} ", ",\\ ")
    return f"${body}$"
