"""`clplatform check`: compose the strategies, put them through the checks, say what was found."""

from __future__ import annotations

import tempfile
import traceback as tb
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from clplatform.build import build_strategies
from clplatform.check.checks import CHECKS, title
from clplatform.check.promise import Broken, DoesNotApply
from clplatform.check.small import SMALL
from clplatform.check.subject import CAPACITY, Node, Subject
from clplatform.compose import compose_and_run
from clplatform.config import check_strategies, resolved
from clplatform.signature import check_node


@dataclass(frozen=True)
class Verdict:
    """What one check has found."""

    check: str
    result: Literal["kept", "broken", "does not apply"]
    promise: str
    message: str = ""
    traceback: str = ""


def verdicts(nodes: dict[str, Node]) -> Iterator[Verdict]:
    """Put strategies through the checks, one after the other.

    Args:
        nodes: name → node of the configuration.

    Raises:
        ClplatformError: they cannot be built.
    """
    subject = Subject(nodes)
    for check in CHECKS:
        what = check.__name__, title(check)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(subject)
            yield Verdict(what[0], "kept", what[1])
        except DoesNotApply as reason:
            yield Verdict(what[0], "does not apply", what[1], str(reason))
        except Broken as problem:
            yield Verdict(what[0], "broken", what[1], str(problem))
        except Exception as error:
            last = tb.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            yield Verdict(what[0], "broken", what[1], message, tb.format_exc())


def small(nodes: dict[str, Node], settings: list[str]) -> dict[str, Node]:
    """The nodes with settings for a small world, where the user has not set them."""
    typed = {s.lstrip("+").partition("=")[0] for s in settings}
    changed = {}
    for name, node in nodes.items():
        sizes = dict(SMALL.get(name, {}))
        if isinstance(node.get("capacity"), int):
            sizes.setdefault("capacity", min(CAPACITY, node["capacity"]))
        changed[name] = {**node, **{k: v for k, v in sizes.items() if f"strategy.{name}.{k}" not in typed}}
    return changed


def run(settings: list[str], config_dir: str | None = None, *, traceback: bool = False) -> int:
    """Check what these settings compose; returns the exit code: 1 if a promise is broken."""
    nodes: dict[str, Node] = {}

    def task(config: DictConfig) -> None:
        nodes.update(resolved(config)["strategy"])

    with tempfile.TemporaryDirectory() as scratch:
        where = [f"hydra.run.dir={scratch}", "hydra.output_subdir=null"]
        flags = ["--config-dir", config_dir] if config_dir else []
        code = compose_and_run([*flags, *settings, *where], task)
    if code or not nodes:  # Hydra was asked for something else
        return code
    check_strategies(nodes)
    for name, node in nodes.items():
        check_node(f"strategy.{name}", node)
    build_strategies({"strategy": nodes})
    return int(show(verdicts(small(nodes, settings)), list(nodes), traceback=traceback) > 0)


MARKS = {"kept": "[green]✓[/]", "broken": "[red]✗[/]", "does not apply": "[dim]–[/]"}


def show(found: Iterator[Verdict], names: list[str], *, traceback: bool) -> int:
    """Print each verdict as it comes; returns how many promises are broken."""
    console, counts = Console(highlight=False), dict.fromkeys(MARKS, 0)
    console.print(f"[bold]strategy={escape('[' + ','.join(names) + ']' if len(names) > 1 else names[0])}[/]")
    for verdict in found:
        counts[verdict.result] += 1
        dim = "[dim]" if verdict.result == "does not apply" else "[default]"
        console.print(f"{MARKS[verdict.result]} [bold]{verdict.check}[/]  {dim}{escape(verdict.promise)}[/]")
        if verdict.message:
            style = "red" if verdict.result == "broken" else "dim"
            console.print(f"    [{style}]{escape(verdict.message)}[/]")
        if verdict.traceback and traceback:
            console.print(verdict.traceback, markup=False)
    told = f"{counts['kept']} kept, {counts['broken']} broken, {counts['does not apply']} do not apply"
    console.print(f"[bold]{told}[/]")
    return counts["broken"]
