"""Hydra's side of the command line: compose the configuration, run one job or a sweep, report."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from clplatform.config import conf_dir, drop_ghosts, resolved
from clplatform.explain import explain, pages
from clplatform.files import write_json
from clplatform.progress import TOTAL, Announcer, describe, ended, read_records, record, write_total
from clplatform.run import show
from clplatform.search import continue_search
from clplatform.signature import suggest
from clplatform.sweep import LOCK, run_apart, sweep_job
from clplatform.types import ClplatformError

RECORDS = "CLPLATFORM_JOBS"  # environment variable of a job that runs beside others: where it leaves its record
HYDRA_RECORD = ("config.yaml", "hydra.yaml", "overrides.yaml")  # what Hydra writes into a run's .hydra/


@dataclass
class Command:
    """What happens during one call of the command line: Hydra calls back, and keeps return values to itself."""

    jobs: list[dict[str, Any]] = field(default_factory=list)  # records of those that ran in this process
    begun: bool = False
    # Of a sweep: its folder; the settings of its jobs; where jobs in other processes leave records; does one choose settings?
    sweep: Path | None = None
    expected: list[str] = field(default_factory=list)
    records: Path | None = None
    announcer: Announcer | None = None
    search: bool = False
    # Raised when Hydra has returned, which would print a line of its own.
    refusal: ClplatformError | None = None
    # Folders that were not there before, the deepest first.
    new: list[Path] = field(default_factory=list)

    def will_make(self, folder: Path) -> None:
        self.new += [p for p in (folder.absolute(), *folder.absolute().parents) if not p.exists()]

    def tidy(self) -> None:
        """Take away new folders that nothing was put into."""
        for folder in self.new:
            if folder.is_dir() and {p.name for p in folder.iterdir()} <= {"multirun.yaml", TOTAL}:
                for name in ("multirun.yaml", TOTAL):
                    (folder / name).unlink(missing_ok=True)
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
    except NotBegun as stop:
        raise ClplatformError(str(stop)) from stop.__cause__
    except Exception as error:
        if _command.jobs or records():  # the jobs of a sweep
            return finish_sweep(error)
        if isinstance(error, HydraException | OmegaConfBaseException):
            if isinstance(error.__cause__, ClplatformError):
                raise error.__cause__ from None
            raise explain(error, flags.overrides, folders) from error
        if not _command.begun and isinstance(error, OSError) and error.filename:
            raise ClplatformError(f"{error.filename}: no folder can be made there ({error.strerror})") from error
        if not _command.begun and isinstance(error, ValueError):
            raise explain(error, flags.overrides, folders) from error
        if _command.records is not None:
            raise ClplatformError(f"the jobs cannot be started: {type(error).__name__}: {error}") from error
        raise  # a single run: its traceback is the best there is
    finally:
        _command.tidy()
    if _command.refusal is not None:
        raise _command.refusal
    return finish_sweep() if _command.sweep is not None else 0


def call_hydra(arguments: list[str], task: Callable[[DictConfig], Any]) -> None:
    """Let Hydra do what is asked; it reads the process's arguments."""
    argv, full, handler = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), signal.getsignal(signal.SIGTERM)
    sys.argv = ["clplatform", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: the messages are ours
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(task)()
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        os.environ |= {} if full is None else {"HYDRA_FULL_ERROR": full}
        if _command.announcer is not None:
            _command.announcer.stopped.set()
        if _command.records is not None:
            signal.signal(signal.SIGTERM, handler)


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


class NotBegun(BaseException):
    """A sweep that cannot begin. (Of what a callback raises, Hydra makes a warning if it is an Exception.)"""


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
            _command.sweep = Path(config.hydra.sweep.dir).absolute()
        if _command.sweep is not None:
            try:
                self.begin_sweep(config)
            except Exception as error:
                raise NotBegun(f"the sweep cannot begin: {type(error).__name__}: {error}") from error

    def begin_sweep(self, config: DictConfig) -> None:
        sweeper = str(config.hydra.sweeper._target_)
        _command.search = not sweeper.endswith(".BasicSweeper")
        if not _command.search:
            with contextlib.suppress(Exception):  # Hydra does the same next, and says what is wrong
                _command.expected = [" ".join(job) for job in BasicSweeper.split_arguments(typed(config), None)[0]]
        elif sweeper.endswith(".OptunaSweeper") and config.hydra.sweeper.storage:
            searched = [str(o.input_line) for o in typed(config) if o.is_sweep_override()]
            left = continue_search(config, resolved(config), searched)
            _command.expected = [f"trial {i + 1}" for i in range(left)]
        assert _command.sweep is not None
        if _command.expected:
            with contextlib.suppress(OSError):  # Hydra makes a folder there next, and says what is wrong
                write_total(_command.sweep, len(_command.expected))
        if not str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            begin_apart(config)


def typed(config: DictConfig) -> list[Override]:
    """What a sweep varies or sets: by its page, then as typed."""
    params = [f"{k}={v}" for k, v in (config.hydra.sweeper.params or {}).items()]
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return OverridesParser.create().parse_overrides([*params, *overrides])


def begin_apart(config: DictConfig) -> None:
    """Have jobs that run in other processes, side by side, leave records; a signal to this one stops them."""
    assert _command.sweep is not None
    _command.records = _command.sweep / "jobs" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    with read_write(config):
        config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{RECORDS}='{_command.records}'")
    print(f"What the jobs print goes to {_command.records}", flush=True)
    _command.announcer = Announcer(_command.records, len(_command.expected))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if "submitit" in str(config.hydra.launcher._target_):
        wait_for_all()


def wait_for_all() -> None:
    """Hydra's launcher for submitit gives up at the first job that is lost, while others still run: let it wait."""
    from submitit import Job  # pyright: ignore[reportMissingImports]  an extra
    from submitit.core.utils import FailedJobError, UncompletedJobError  # pyright: ignore[reportMissingImports]  an extra

    results = Job.results

    def patient(job: Any) -> list[Any]:
        try:
            return results(job)
        except (FailedJobError, UncompletedJobError) as error:
            lost = JobReturn(status=JobStatus.FAILED)
            lost.return_value = error  # raised when Hydra looks at it
            return [lost]

    Job.results = patient


def job(config: DictConfig) -> float | None:
    """One Hydra job. Returns what a search maximises: the final average accuracy on the validation split."""
    _command.begun = True
    context = HydraConfig.get()
    run_dir = Path(context.runtime.output_dir)
    sweep = context.mode is RunMode.MULTIRUN
    overrides: Any = OmegaConf.to_container(context.overrides.task)  # as typed, interpolations unresolved
    settings = re.sub(r"\\([{}])", r"\1", " ".join(overrides))  # Hydra's sweeper has made $\{seed\} of ${seed}
    number = context.job.num if sweep else 0
    apart = context.job.env_set.get(RECORDS)
    path = Path(apart) / f"{number}.json" if apart else None
    begun = record(run_dir, settings)
    if sweep:
        print(f"Job {number + 1}: {settings}", flush=True)
    if path is not None:
        write_json(path, begun)
    value, reason = None, None
    try:
        with refusals(run_dir, overrides):
            values = resolved(config)
            own = [Path(source.path) for source in context.runtime.config_sources if source.schema == "file"]
            notices = drop_ghosts(values, pages("strategy", own), overrides)
            if path is not None:
                value = run_apart(values, run_dir, notices=notices, record=path)
            else:
                value = (sweep_job if sweep else show)(values, run_dir, notices=notices)
    except Exception as error:
        if not sweep:
            if isinstance(error, ClplatformError):
                _command.refusal = error
                return None
            raise
        reason = str(error) if isinstance(error, ClplatformError) else f"{type(error).__name__}: {error}"
    search = sweep and not str(context.sweeper._target_).endswith(".BasicSweeper")
    if search and value is None and reason is None:
        reason = "a search chooses by validation data, of which there are none; give stream.validation_fraction=0.1"
    if path is not None:
        write_json(path, ended(begun, reason, value))
        print(f"Job {number + 1}: {'complete' if reason is None else 'failed'}", flush=True)
    elif sweep:
        _command.jobs.append(ended(begun, reason, value))
        if reason is not None:
            tell(f"job {run_dir.name} ({settings}) failed: {reason}")
        print(describe(_command.jobs, max(len(_command.expected), len(_command.jobs))), flush=True)
    return value  # a search takes None for a failed trial


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
            (run_dir / LOCK).unlink(missing_ok=True)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                remove_empty(run_dir)
        if isinstance(error, ClplatformError):
            raise
        raise explain(error, overrides, [conf_dir()]) from error


def remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def records() -> dict[int, dict[str, Any]]:
    """What the jobs in other processes have left."""
    return read_records(_command.records) if _command.records is not None else {}


def finish_sweep(error: Exception | None = None) -> int:
    """One report over all jobs, and what failed.

    Args:
        error: what ended the sweep before all its jobs had come back.
    """
    from clplatform.report import report

    assert _command.sweep is not None
    left = records()
    jobs = {Path(found["run"]): found["problem"] for found in (*_command.jobs, *left.values())}
    there = [p.parent for p in _command.sweep.glob("*/results.json")] if _command.search else jobs
    readable = [path for path in there if (path / "results.json").exists()]
    if readable:
        print(f"Comparison of {len(readable)} runs: {report(readable, _command.sweep)}", flush=True)
    if (best := _command.sweep / "optimization_results.yaml").exists() and _command.search:
        print(f"Best of the search: {best.read_text().strip()}".replace("\n", "\n  "), flush=True)
    for number, found in left.items():
        if found["problem"] is not None:
            log = f"; see {_command.records}/{number}.log"
            tell(f"job {Path(found['run']).name} ({found['settings']}) failed: {found['problem']}{log}")
    missing = [] if _command.records is None else [s for n, s in enumerate(_command.expected) if n not in left]
    for settings in missing:
        tell(f"job ({settings}) has not been run, or has left no record in {_command.records}")
    failed = [path.name for path, reason in jobs.items() if reason is not None]
    if error is not None and (missing or not failed):
        tell(f"the sweep has ended early: {type(error).__name__}: {error}")
    if failed or missing or error is not None:
        names = ", ".join(failed + (["those that have not been run"] if missing else [])) or "not all came back"
        total = len(jobs) + len(missing)
        tell(
            f"{len(failed) + len(missing)} of {total} jobs failed ({names}); the same command runs only what is missing"
        )
        return 1
    return 0


def tell(message: str) -> None:
    print(f"clplatform: {message}", file=sys.stderr, flush=True)
