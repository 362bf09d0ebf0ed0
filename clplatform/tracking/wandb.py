"""Weights & Biases through Lightning's logger: a mirror of the record, which never stops or holds up a run.

Every call is guarded. The first failure is reported once on stderr and ends the mirroring; the record in
the run directory is complete without it. wandb is imported when the first row is logged, not before.

X-axes are our own values, not W&B's row counter: `step` (of the whole run) for the training curves and
`experience` for what is measured after each experience. So a resumed run goes on in the same curves, offline
too, where its second file belongs to the same run id and `wandb sync` uploads both in order.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from clplatform.tracking.credentials import has_key
from clplatform.tracking.logger import Matrix, Row, RunContext, RunLogger

Mode = Literal["auto", "online", "offline", "off"]
SECONDS_BETWEEN_IMAGES = 30.0


class Wandb:
    """`metrics.jsonl`, and its mirror in W&B. Keys come from the environment or netrc only.

    Args:
        every_n_steps: steps between two logged training losses.
        mode: `auto` is online where there is a key and offline elsewhere (WANDB_MODE, if set, decides); `off`
            leaves W&B out (a bare off in a YAML page arrives as False).
        project, entity, group, tags: where W&B files the run.
        name: of the run; None: made from strategy, stream and seed.
        init_timeout: seconds to wait for the server; after that the run is recorded offline.
        finish_timeout: seconds to wait for the upload at the end; what is left is on disk for `wandb sync`.
        report, model: also keep the report, or the trained model, as an artifact of the run when it is complete.
    """

    def __init__(
        self,
        *,
        every_n_steps: Annotated[int, Ge(1)],
        mode: Mode | Literal[False],
        project: str,
        entity: str | None,
        group: str | None,
        tags: list[str],
        name: str | None,
        init_timeout: Annotated[float, Gt(0)],
        finish_timeout: Annotated[float, Gt(0)],
        report: bool,
        model: bool,
    ) -> None:
        self.every_n_steps, self.mode = every_n_steps, mode or "off"
        self.project, self.entity, self.group, self.tags, self.name = project, entity, group, tags, name
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        self.report, self.model = report, model

    def loggers(self, run: RunContext) -> list[RunLogger]:
        mode = chosen_mode(self.mode)
        return [] if mode == "off" else [WandbMirror(run, self, mode)]


def chosen_mode(mode: str) -> Literal["online", "offline", "off"]:
    """What `auto` means here and now; the environment decides before the presence of a key does."""
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "").lower()
        if wanted in ("disabled", "off") or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return "off"
        return "online" if wanted in ("", "online", "run") and has_key() else "offline"
    assert mode in ("online", "offline", "off")
    return mode  # type: ignore[return-value]


class WandbMirror(RunLogger):
    """Mirrors rows into one W&B run, whose id is the run's.

    Args:
        run: the run.
        settings: the page.
        mode: `online` or `offline`.
    """

    def __init__(self, run: RunContext, settings: Wandb, mode: str) -> None:
        super().__init__(run)
        self.settings, self.mode = settings, mode
        self.inner: Any = None  # Lightning's WandbLogger
        self.failed = False
        self.matrix: Matrix = run.matrix
        self._drawn_at, self._drawn_rows = time.monotonic(), 0

    def write(self, row: Row) -> None:
        self._guard(
            lambda: self._log({**row.metrics, "step": row.step, "experience": row.experience, "epoch": row.epoch})
        )

    def write_matrix(self, matrix: Matrix, row: Row) -> None:
        self.matrix = matrix
        self.write(row)
        # A heat map costs a tenth of a second, the first one an import: short runs draw one, at their end.
        if time.monotonic() - self._drawn_at > SECONDS_BETWEEN_IMAGES:
            self._guard(self._log_image)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        if self.inner is None:
            if not (status == "completed" and self.matrix):
                return  # nothing happened that is worth a run
            self._guard(lambda: setattr(self, "inner", self._start()))  # stopped after its last row, now completed
            if self.inner is None:
                return
        self._guard(lambda: self._summarize(status, summary))
        if self.matrix:
            if self._drawn_rows < len(self.matrix):
                self._guard(self._log_image)
            self._guard(self._log_table)
        if status == "completed":
            self._guard(self._log_artifacts)
        self.failed = False  # whatever went wrong before: try to close the file
        self._guard(lambda: self.inner.experiment.finish(exit_code=0 if status == "completed" else 1))
        self.inner = None

    # -- what is logged ---------------------------------------------------------------------------------------------
    def _log(self, values: dict[str, Any]) -> None:
        if self.inner is None:
            self.inner = self._start()
        self.inner.log_metrics(values)

    def _log_image(self) -> None:
        from clplatform.tracking.heatmap import heat_map

        self._drawn_at, self._drawn_rows = time.monotonic(), len(self.matrix)
        self._log_with_experience({"matrix": self._wandb().Image(heat_map(self.matrix, self.run))})

    def _log_table(self) -> None:
        names = self.run.experience_names or tuple(str(j + 1) for j in range(len(self.matrix[0])))
        rows = [[i, *row] for i, row in enumerate(self.matrix)]
        self._log_with_experience({"matrix_table": self._wandb().Table(columns=["after", *names], data=rows)})

    def _log_with_experience(self, values: dict[str, Any]) -> None:
        self.inner.log_metrics({**values, "experience": len(self.matrix) - 1})

    def _summarize(self, status: str, summary: Mapping[str, Any]) -> None:
        known = {name: value for name, value in summary.items() if value is not None}
        self.inner.experiment.summary.update({**known, "status": status})

    def _log_artifacts(self) -> None:
        """Files of the run directory that nobody will write again: a run recorded offline uploads them later."""
        run_dir, wanted = self.run.run_dir, []
        if self.settings.report and (run_dir / "results.json").is_file():
            from clplatform.report import write_report

            copy = run_dir / "wandb" / "report"
            write_report(run_dir, copy)
            shutil.copy(run_dir / "results.json", copy)  # both are written again when there are reference runs
            wanted.append(("report", copy))
        if self.settings.model and (run_dir / "model").is_dir():
            wanted.append(("model", run_dir / "model"))
        for kind, folder in wanted:
            artifact = self._wandb().Artifact(f"{kind}-{self.run.run_id}", type=kind)
            artifact.add_dir(str(folder), policy="immutable")
            self.inner.experiment.log_artifact(artifact)

    # -- starting -----------------------------------------------------------------------------------------------------
    def _start(self) -> Any:
        if self.mode == "online":
            before = set(self._folders())
            try:
                return self._init("online")
            except Exception as error:
                self._report(f"is not reachable ({_first_line(error)})", "recording offline instead; upload it later")
                if self._wandb().run is None:  # frees the id, which the failed attempt holds
                    self._wandb().teardown()
                for folder in set(self._folders()) - before:
                    shutil.rmtree(folder, ignore_errors=True)
        return self._init("offline")

    def _init(self, mode: str) -> Any:
        if mode == "online" and not has_key():
            raise PermissionError("no key: set WANDB_API_KEY, or run `wandb login` once")  # or wandb would ask for it
        from pytorch_lightning.loggers import WandbLogger

        wandb = self._wandb()
        run_dir = self.run.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(f"cannot write to {run_dir}")  # or wandb would write somewhere else
        settings = self._wandb_settings()
        wandb.setup(settings=settings)
        s = self.settings
        run = wandb.init(
            project=s.project, entity=s.entity, group=s.group, tags=[*s.tags, *run_tags(self.run.config)],
            job_type=job_type(self.run.config), name=s.name or run_name(self.run.config),
            id=self.run.run_id, resume="allow", mode=mode, dir=str(run_dir), config=self.run.config, settings=settings,
        )  # fmt: skip
        run.define_metric("step", hidden=True)
        run.define_metric("experience", hidden=True)
        for prefix in ("train", "validation"):
            run.define_metric(f"{prefix}/*", step_metric="step")
        run.define_metric("evaluation/*", step_metric="experience")
        run.define_metric("matrix", step_metric="experience")
        return WandbLogger(
            experiment=run, project=s.project, save_dir=str(run_dir), id=self.run.run_id, log_model=False
        )

    def _wandb_settings(self) -> Any:
        settings = self._wandb().Settings
        wanted = {
            "console": "off",
            "silent": True,
            "init_timeout": self.settings.init_timeout,
            "login_timeout": self.settings.init_timeout,
            "finish_timeout": self.settings.finish_timeout,
            "reinit": "create_new",  # a run of the caller's own, say in a notebook, stays what it is
            "disable_git": True,  # environment.json has it, without the diff
        }
        return settings(**{name: value for name, value in wanted.items() if name in settings.model_fields})

    @staticmethod
    def _wandb() -> Any:
        import wandb

        return wandb

    def _folders(self) -> list[Path]:
        return list((self.run.run_dir / "wandb").glob(f"run-*-{self.run.run_id}"))

    # -- failing ------------------------------------------------------------------------------------------------------
    def _guard(self, call: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            call()
        except Exception as error:
            self.failed = True
            self._report(f"failed ({_first_line(error)})", "no more is sent to it; tracking=local leaves it out")

    def _report(self, what: str, remedy: str) -> None:
        print(f"clplatform: W&B {what}: the run goes on, its record is {self.run.run_dir}; {remedy}", file=sys.stderr)


def run_name(config: Mapping[str, Any]) -> str:
    """`replay+lwf split_digits seed 0`"""
    strategy = "+".join(config.get("strategy", {}))
    stream = config.get("stream", {}).get("name", "")
    return " ".join(part for part in (strategy, stream, f"seed {config.get('seed', 0)}") if part)


def job_type(config: Mapping[str, Any]) -> str | None:
    """`replay+lwf`: runs are grouped by it, and it fits into a column."""
    return "+".join(config.get("strategy", {})) or None


def run_tags(config: Mapping[str, Any]) -> list[str]:
    """Stream, scenario, backbone, tuning and budget, to filter by."""
    stream, budget = config.get("stream", {}), config.get("budget") or {}
    tuning = str((config.get("tuning") or {}).get("_target_", "")).rpartition(".")[2].lower()
    found = [stream.get("name"), stream.get("scenario"), (config.get("backbone") or {}).get("name")]
    found += [tuning if tuning != "full" else None, *(f"budget.{k}={v:g}" for k, v in budget.items() if v is not None)]
    return [str(tag)[:64] for tag in found if tag]  # W&B takes no longer ones


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
