"""Hydra's side of the command line: compose the configuration, run one job or a sweep, report."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from clplatform.config import conf_dir, resolved, suggest
from clplatform.files import read_json
from clplatform.types import ClplatformError

# Jobs of this process's sweep: run directory → what went wrong, or None.
_jobs: dict[Path, str | None] = {}
# Why a single run was refused: raised when Hydra has returned, which would print a line of its own.
_refused: list[ClplatformError] = []


def compose_and_run(arguments: list[str]) -> int:
    """What `clplatform [flags] [overrides]` does. Returns the exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: the messages are ours
    _jobs.clear()
    _refused.clear()
    refuse_repetition(arguments)
    argv, sys.argv = sys.argv, ["clplatform", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, ClplatformError):
            raise error.__cause__ from None
        raise explain(error, arguments) from error
    except Exception as error:
        if "Config group override must be" in str(error):
            raise ClplatformError(f"{error}; plain fine-tuning is strategy=finetuning") from None
        if not _jobs:  # a single run: its traceback is the best there is
            raise
    finally:
        sys.argv = argv
    if _refused:
        raise _refused[0]
    return finish_sweep() if _jobs else 0


def job(config: DictConfig) -> float | None:
    """One Hydra job. Returns what a search maximises: the final average accuracy on the validation split."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        try:
            return show(resolved(config), run_dir)
        except ClplatformError as error:
            _refused.append(error)
            remove_empty(run_dir)
            return None
    try:
        value = sweep_job(resolved(config), run_dir)
    except Exception as error:
        _jobs[run_dir] = f"{type(error).__name__}: {error}" if not isinstance(error, ClplatformError) else str(error)
        print(f"clplatform: job {run_dir.name} failed: {_jobs[run_dir]}", file=sys.stderr)
        raise
    _jobs[run_dir] = None
    return value


def sweep_job(config: dict[str, Any], run_dir: Path) -> float | None:
    """A job whose folder is named after its configuration: skipped when complete, continued when begun."""
    if (run_dir / "results.json").exists():
        if read_json(run_dir / "results.json")["status"] == "completed":
            print(f"{run_dir}: complete already")
            return objective(read_json(run_dir / "results.json"))
        return show(config, run_dir, resume=True)
    return show(config, run_dir)


def show(config: dict[str, Any], run_dir: Path, *, resume: bool = False) -> float | None:
    """Run, then write the report and print the tables."""
    from rich.console import Console

    from clplatform.report import write_report
    from clplatform.run import execute
    from clplatform.tracking.tables import print_matrix, print_summary

    results = execute(config, run_dir, resume=resume)
    report = write_report(run_dir)
    console = Console()
    metric = results.primary_metric
    print_matrix(
        results.matrix, results.stream["experience_names"], metric["name"], metric["higher_is_better"], console
    )
    print_summary(results.metrics, results.cost, report, console)
    return objective(read_json(run_dir / "results.json"))


def objective(results: dict[str, Any]) -> float | None:
    """Average accuracy on the validation split after the last experience; None without such a split."""
    row = [value for value in (results.get("validation_matrix") or [[]])[-1] if value is not None]
    return sum(row) / len(row) if row else None


def remove_empty(run_dir: Path) -> None:
    """Take away the folder of a run that was refused before it began."""
    if not (run_dir / "results.json").exists():
        shutil.rmtree(run_dir, ignore_errors=True)


def refuse_repetition(arguments: list[str]) -> None:
    """`strategy=[replay,replay]` would quietly be one."""
    for argument in arguments:
        listed = re.fullmatch(r"strategy=\[([\w,\s]*)\]", argument)
        names = [n.strip() for n in listed[1].split(",")] if listed else []
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ClplatformError(f"{argument}: {twice[0]} is named twice")


def finish_sweep() -> int:
    """One report over all jobs, and what failed."""
    from clplatform.report import report

    failed = {path: reason for path, reason in _jobs.items() if reason is not None}
    readable = [path for path in _jobs if (path / "results.json").exists()]
    if readable:
        print(f"Comparison of {len(readable)} runs: {report(readable, next(iter(_jobs)).parent)}")
    for path, reason in failed.items():
        print(f"clplatform: {path} failed: {reason}", file=sys.stderr)
    if failed:
        print(
            f"clplatform: {len(failed)} of {len(_jobs)} jobs failed; the same command runs only what is missing",
            file=sys.stderr,
        )
    return 1 if failed else 0


# -- errors --------------------------------------------------------------------------------------------------------


def explain(error: Exception, arguments: list[str]) -> ClplatformError:
    """Hydra's message in one or two lines that say what to do."""
    text = f"{error}\n{error.__cause__ or ''}"
    if isinstance(error, OverrideParseException):
        return ClplatformError(f"{error.override}: not of the form setting=value (quote it if the shell may change it)")
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        setting, _, values = several[1].partition("=")
        return ClplatformError(
            f"{several[1]}: several values are a sweep, which needs -m; to use them together write {setting}=[{values}]"
        )
    missing = re.search(r"Could not find '(\w+)/([^']+)'", text) or re.search(r"Could not find '()([^']+)'", text)
    if isinstance(error, MissingConfigException) and missing:
        group, name = missing[1], missing[2]
        pages = [p.stem for p in (conf_dir() / group).glob("*.yaml")]
        return ClplatformError(f"{group}={name}: there is no such {group}{suggest(name, pages)}; see `clplatform list`")
    key = re.search(r"Key '([^']+)' is not in struct", text) or re.search(r"Could not override '([^']+)'", text)
    if key:
        return _unknown_key(key[1], text, arguments)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ClplatformError("; ".join(dict.fromkeys(lines[:2])))


def _unknown_key(key: str, text: str, arguments: list[str]) -> ClplatformError:
    full = (re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", text) or [key, key])[1]
    typed = next((a for a in arguments if a.lstrip("+~").startswith(full)), full)
    parts = full.split(".")
    strategies = {p.stem for p in (conf_dir() / "strategy").glob("*.yaml")}
    if parts[0] == "strategy" and len(parts) > 1 and parts[1] in strategies and key == parts[1]:
        return ClplatformError(
            f"{typed}: the strategy {key} is not chosen; add strategy={key}, or strategy=[replay,{key}] for several"
        )
    known = strategies if parts[0] == "strategy" and len(parts) == 2 else _siblings(parts, arguments)
    return ClplatformError(f"{typed}: there is no such setting{suggest(parts[-1], known)}")


def _siblings(parts: list[str], arguments: list[str]) -> set[str]:
    """Keys that stand where the unknown one was put, on the page that is chosen."""
    from omegaconf import OmegaConf

    root: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "run.yaml"))
    if len(parts) == 1:
        groups = {p.name for p in conf_dir().iterdir() if p.is_dir()}
        return groups | set(root) - {"defaults", "hydra"}
    if parts[0] == "strategy":
        page = conf_dir() / "strategy" / f"{parts[1]}.yaml"
    else:
        chosen = {k: v for entry in root["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
        chosen |= dict(a.split("=", 1) for a in arguments if re.fullmatch(r"\w+=\w+", a))
        page = conf_dir() / parts[0] / f"{chosen.get(parts[0])}.yaml"
    values: Any = OmegaConf.to_container(OmegaConf.load(page)) if page.is_file() else root.get(parts[0], {})
    for part in parts[1:-1]:
        values = values.get(part) or {}
    return {str(k) for k in values} - {"_target_", "_partial_", "name"}
