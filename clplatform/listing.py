"""`clplatform list`: read from the pages and the source, without importing what they describe (no torch)."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clplatform.types import CLASSES, LANGUAGE, PROBLEMS

KINDS = [
    "streams", "backbones", "tuning", "heads", "strategies", "optimizers", "schedulers", "tracking", "metrics",
    "experiments", "sweeps",
]  # fmt: skip
FOLDERS = {
    "streams": "stream", "backbones": "backbone", "tuning": "tuning", "heads": "head", "strategies": "strategy",
    "tracking": "tracking", "optimizers": "optimizer", "schedulers": "scheduler", "experiments": "experiment",
    "sweeps": "sweep",
}  # fmt: skip


def show(kinds: Sequence[str], config_dir: Path | None = None) -> None:
    """Print one table for each kind."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console.width = 400
    for kind in kinds:
        header, rows = (
            strategies(config_dir)
            if kind == "strategies"
            else backbones(config_dir)
            if kind == "backbones"
            else metrics()
            if kind == "metrics"
            else pages(kind, config_dir)
        )
        if not rows:
            continue
        table = Table(title=kind, title_justify="left", box=None, header_style="bold", pad_edge=False, expand=False)
        for i, name in enumerate(header):
            table.add_column(name, style="bold" if i == 0 else "", no_wrap=i == 0)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print()


def pages(kind: str, config_dir: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """Name and first comment of every page of a group."""
    return ["name", "what it is"], [[path.stem, comment(path)] for path in _files(FOLDERS[kind], config_dir)]


def backbones(config_dir: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """Name, what it learns, and first comment of every backbone's page."""
    found = [(path, source_of(yaml.safe_load(path.read_text()) or {})) for path in _files("backbone", config_dir)]
    rows = [[path.stem, learns(source[1] if source else None), comment(path)] for path, source in found]
    return ["name", "learns", "what it is"], rows


def strategies(config_dir: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """Name, family, needs, what it does, paper, and what it learns, of every strategy."""
    rows = []
    for path in _files("strategy", config_dir):
        facts = strategy_facts(path)
        needs = ", ".join(facts["needs"]) or "–"
        rows.append([path.stem, facts["family"], needs, comment(path), facts["paper"], facts["learns"]])
    return ["name", "family", "needs", "what it does", "source", "learns"], sorted(rows, key=lambda r: (r[1], r[0]))


def metrics() -> tuple[list[str], list[list[str]]]:
    """The metrics' names, formulas and sources."""
    from clplatform.metric.matrix import METRICS

    return ["name", "formula", "source"], [[m.name, m.formula, m.source] for m in METRICS]


def strategy_facts(page: Path) -> dict[str, Any]:
    """`family`, `needs`, `paper` and `learns` of the class that a page's target names, read from its source."""
    nodes = [n for n in (yaml.safe_load(page.read_text()) or {}).values() if isinstance(n, dict) and "_target_" in n]
    found = source_of(nodes[0] if nodes else {})
    if found is None:
        return {"family": "?", "needs": [], "paper": "", "learns": "?"}
    tree, values = found
    needs = values.get("needs")
    return {
        "family": ast.literal_eval(values["family"]) if "family" in values else "baseline",
        "needs": sorted(ast.literal_eval(needs.args[0])) if isinstance(needs, ast.Call) and needs.args else [],
        "paper": paper(ast.get_docstring(tree) or ""),
        "learns": learns(values),
    }


def source_of(node: dict[str, Any]) -> tuple[ast.Module, dict[str, ast.expr]] | None:
    """The module of a node's target, and what its class sets; None: somebody's own, which would have to be imported."""
    module, _, name = str(node.get("_target_", "")).rpartition(".")
    source = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not (module.startswith("clplatform.") and source.is_file()):
        return None
    tree = ast.parse(source.read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return tree, {
        t.id: n.value for n in cls.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
    }


def named(node: ast.expr) -> set[str]:
    """The problems that an expression in a source names: a set of ours, one written out, or one without another."""
    if isinstance(node, ast.Name):
        return set({"PROBLEMS": PROBLEMS, "LANGUAGE": LANGUAGE, "CLASSES": CLASSES}[node.id])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return named(node.left) - named(node.right)
    return set(ast.literal_eval(node.args[0] if isinstance(node, ast.Call) else node))  # frozenset({…}) or {…}


def learns(values: dict[str, ast.expr] | None) -> str:
    """The problems of a class, in words; None: it is not known."""
    if values is None:
        return "?"
    problems = named(values["problems"]) if "problems" in values else {"classification"}
    absent = PROBLEMS - problems
    if len(absent) < 2:
        return " but ".join(["all", *([", ".join(sorted(absent))] if absent else [])])
    return ", ".join(sorted(problems))


def paper(docstring: str) -> str:
    """What stands in the first parentheses of the docstring's first paragraph, if it looks like a citation."""
    first = " ".join(docstring.split("\n\n")[0].split())
    inside = first[first.find("(") + 1 : first.rfind(")")] if "(" in first else ""
    return inside.split(";")[0] if any(c.isdigit() for c in inside) else ""


def comment(path: Path) -> str:
    """The comment at the top of a page."""
    lines = []
    for line in path.read_text().splitlines():
        if line.startswith("# @") or (not lines and not line.strip()):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def _files(folder: str, config_dir: Path | None) -> list[Path]:
    package = Path(__file__).resolve().parent
    conf = package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
    found = [p for base in (conf, config_dir) if base is not None for p in (base / folder).glob("*.yaml")]
    return sorted(found, key=lambda p: p.stem)
