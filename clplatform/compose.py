"""Hydra's side of the command line: compose the configuration, run one job or a sweep, report."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from clplatform.config import conf_dir, drop_ghosts, identity, resolved
from clplatform.explain import explain, pages
from clplatform.files import read_json
from clplatform.run import objective, show
from clplatform.signature import suggest
from clplatform.types import ClplatformError

HYDRA_RECORD = ("config.yaml", "hydra.yaml", "overrides.yaml")  # what Hydra writes into a run's .hydra/


@dataclass
class Command:
    """What happens during one call of the command line: Hydra calls back, and keeps return values to itself."""

    jobs: dict[Path, str | None] = field(default_factory=dict)  # of a sweep: run directory → what went wrong, or None
    begun: bool = False
    # Raised when Hydra has returned, which would print a line of its own.
    refusal: ClplatformError | None = None
    # Folders that were not there before, the deepest first.
    new: list[Path] = field(default_factory=list)

    def will_make(self, folder: Path) -> None:
        self.new += [p for p in (folder.absolute(), *folder.absolute().parents) if not p.exists()]

    def tidy(self) -> None:
        """Take away new folders that nothing was put into."""
        for folder in self.new:
            if folder.is_dir() and [p.name for p in folder.iterdir()] == ["multirun.yaml"]:
                (folder / "multirun.yaml").unlink()
            remove_empty(folder)


_command = Command()


def compose_and_run(arguments: list[str], task: Callable[[DictConfig], Any] | None = None) -> int:
    """What `clplatform [flags] [overrides]` does, with `task` in place of a run. Returns the exit code."""
    global _command
    _command = Command()
    flags = parse_flags(arguments)
    refuse_repetition(flags.overrides)
    folders = [*([Path(flags.config_dir)] if flags.config_dir else []), conf_dir()]
    try:
        call_hydra([*[a for a in arguments if a not in flags.overrides], *flags.overrides], task or job)  # flags first
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, ClplatformError):
            raise error.__cause__ from None
        raise explain(error, flags.overrides, folders) from error
    except Exception as error:
        if not _command.begun and isinstance(error, OSError) and error.filename:
            raise ClplatformError(f"{error.filename}: no folder can be made there ({error.strerror})") from error
        if not _command.begun and isinstance(error, ValueError):
            raise explain(error, flags.overrides, folders) from error
        if not _command.jobs:  # a single run: its traceback is the best there is
            raise
    finally:
        _command.tidy()
    if _command.refusal is not None:
        raise _command.refusal
    return finish_sweep() if _command.jobs else 0


def call_hydra(arguments: list[str], task: Callable[[DictConfig], Any]) -> None:
    """Let Hydra do what is asked; it reads the process's arguments."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["clplatform", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: the messages are ours
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(task)()
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        os.environ |= {} if full is None else {"HYDRA_FULL_ERROR": full}


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Hydra's flags and the settings.

    Raises:
        ClplatformError: there is no such flag.
    """
    parser, told = get_args_parser(), io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            flags, unknown = parser.parse_known_intermixed_args(arguments)
    except SystemExit:
        reason = told.getvalue().strip().rpartition("error: ")[2]
        raise ClplatformError(f"{reason}; see `clplatform --help`") from None
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        raise ClplatformError(f"{unknown[0]}: there is no such option{suggest(unknown[0], known)}")
    return flags


def refuse_repetition(overrides: list[str]) -> None:
    """`strategy=[replay,replay]` would quietly be one."""
    for override in overrides:
        for listed in re.findall(r"\[([\w,\s]*)\]", override) if override.startswith("strategy=") else []:
            names = [n.strip() for n in listed.split(",")]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ClplatformError(f"{override}: {twice[0]} is named twice")


# -- jobs ------------------------------------------------------------------------------------------------------------


class Folders(Callback):
    """Told by Hydra before it makes a folder (see `conf/run.yaml`), so that a refused run leaves none behind."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with contextlib.suppress(OmegaConfBaseException):  # an interpolation that fails is refused in the job
            run_dir = Path(config.hydra.run.dir)
            _command.will_make(run_dir)
            if (run_dir / "results.json").exists():  # the record of that run would be written over
                with read_write(config):
                    config.hydra.output_subdir = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with contextlib.suppress(OmegaConfBaseException):
            _command.will_make(Path(config.hydra.sweep.dir))


def job(config: DictConfig) -> float | None:
    """One Hydra job. Returns what a search maximises: the final average accuracy on the validation split."""
    _command.begun = True
    context = HydraConfig.get()
    run_dir = Path(context.runtime.output_dir)
    sweep = context.mode is RunMode.MULTIRUN
    overrides: Any = OmegaConf.to_container(context.overrides.task)  # as typed, interpolations unresolved
    settings = " ".join(overrides)
    if sweep:
        print(f"Job {context.job.num + 1}: {settings}")
    try:
        with refusals(run_dir, overrides):
            values = resolved(config)
            own = [Path(source.path) for source in context.runtime.config_sources if source.schema == "file"]
            notices = drop_ghosts(values, pages("strategy", own))
            value = (sweep_job if sweep else show)(values, run_dir, notices=notices)
    except Exception as error:
        if not sweep:
            if isinstance(error, ClplatformError):
                _command.refusal = error
                return None
            raise
        reason = str(error) if isinstance(error, ClplatformError) else f"{type(error).__name__}: {error}"
        _command.jobs[run_dir] = reason
        print(f"clplatform: job {run_dir.name} ({settings}) failed: {reason}", file=sys.stderr)
        if str(context.sweeper._target_).endswith(".BasicSweeper"):
            return None  # it would say so once more
        raise  # a search must know
    _command.jobs |= {run_dir: None} if sweep else {}
    return value


@contextlib.contextmanager
def refusals(run_dir: Path, overrides: list[str]) -> Iterator[None]:
    """A run that is refused inside leaves no folder behind, and is refused in our words."""
    try:
        yield
    except (ClplatformError, OmegaConfBaseException) as error:
        if not (run_dir / "results.json").exists():
            for name in HYDRA_RECORD:
                (run_dir / ".hydra" / name).unlink(missing_ok=True)
            remove_empty(run_dir / ".hydra")
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                remove_empty(run_dir)
        if isinstance(error, ClplatformError):
            raise
        raise explain(error, overrides, [conf_dir()]) from error


def remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def sweep_job(config: dict[str, Any], run_dir: Path, *, notices: list[str]) -> float | None:
    """A job whose folder is named after its configuration: skipped when complete, continued when begun."""
    if not (run_dir / "results.json").exists():
        return show(config, run_dir, notices=notices)
    there: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    if identity(there) != identity(config):  # hydra.sweep.subdir says something else than ${config_hash:}
        raise ClplatformError(f"{run_dir} holds a run of another configuration; give another hydra.sweep.dir or subdir")
    if read_json(run_dir / "results.json")["status"] == "completed":
        print(f"{run_dir}: complete already")
        return objective(read_json(run_dir / "results.json"))
    return show(config, run_dir, resume=True, notices=notices)


def finish_sweep() -> int:
    """One report over all jobs, and what failed."""
    from clplatform.report import report

    jobs = _command.jobs
    failed = [path.name for path, reason in jobs.items() if reason is not None]
    readable = [path for path in jobs if (path / "results.json").exists()]
    if readable:
        print(f"Comparison of {len(readable)} runs: {report(readable, next(iter(jobs)).parent)}")
    if failed:
        print(
            f"clplatform: {len(failed)} of {len(jobs)} jobs failed ({', '.join(failed)}); the same command runs only "
            "what is missing",
            file=sys.stderr,
        )
    return 1 if failed else 0
