"""Progress of the whole run on the terminal: one live display over all Trainers, or plain lines where there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from clplatform.metric.score import is_share
from clplatform.tracking.pace import Pace, left_text
from clplatform.tracking.tables import cell_text, duration, heat, tolerate
from clplatform.types import ExperienceInfo

HERTZ = 4  # of the display, and at most of reading the loss (which waits for the device)


class TerminalProgress(Callback):
    """Experience, epoch, batches, loss terms and time left of a run; finished experiences stay as lines above.

    A context: leaving it, whatever the reason, gives the terminal back. The same object serves every
    stage's fresh Trainer. Without a terminal (a log file, CI) it prints one line per experience.

    Args:
        n_experiences: of the stream.
        class_names: by class number; shown for the current experience.
        enabled: False prints nothing.
        metric: shares are shown as percentages.
        console: where to print; None: standard output.
    """

    def __init__(
        self,
        n_experiences: int,
        class_names: Sequence[str],
        enabled: bool = True,
        *,
        metric: str = "accuracy",
        console: Console | None = None,
    ) -> None:
        self.n_experiences, self.class_names, self.enabled, self.metric = n_experiences, class_names, enabled, metric
        self.console = tolerate(console or Console())
        self.pace = Pace(n_experiences)
        self.info: ExperienceInfo | None = None
        self.phase, self.epoch, self.n_epochs = "starting", 0, 0
        self.batch, self.n_batches = 0, 0
        self.terms: dict[str, float] = {}
        self._read_at = -math.inf
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="cyan")

    # -- the run -------------------------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        if self.enabled and self.console.is_terminal and self._live is None:
            self._live = Live(
                get_renderable=self.render, console=self.console, refresh_per_second=HERTZ, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; may be called at any time."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def show_finished(self, rows: Sequence[Sequence[float | None]], seconds: Sequence[float]) -> None:
        """A resumed run starts with the experiences it has finished: their rows of the matrix and their times."""
        self.pace.resume(seconds)
        if self.enabled:
            for index, (row, spent) in enumerate(zip(rows, seconds, strict=True)):
                self._print(index, row, spent)

    def start_experience(self, info: ExperienceInfo, n_steps: int) -> None:
        """An experience begins.

        Args:
            info: which.
            n_steps: batches of all its epochs (an estimate is enough).
        """
        self.info, self.phase, self.terms = info, "preparing", {}
        self.batch = self.n_batches = self.epoch = self.n_epochs = 0
        self.pace.start_experience(info.index, n_steps)

    def finish_experience(self, row: Sequence[float | None]) -> None:
        """An experience has been learned and evaluated: `row` is its row of the matrix."""
        if self.info is None or not self.enabled:
            return
        seconds = self.pace.finish_experience()
        self.phase = "starting"
        self._print(self.info.index, row, seconds)

    # -- Lightning's hooks -----------------------------------------------------------------------------------------
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.n_epochs = max(trainer.max_epochs or 0, 0)  # -1: until a budget is used
        self.n_batches = int(trainer.num_training_batches)
        self.batch, self.phase = 0, "training"
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed  # of this epoch, when it goes on
        self.pace.start_stage(self.n_epochs * self.n_batches, trainer.current_epoch * self.n_batches + done)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch, self.batch, self.phase = trainer.current_epoch, 0, "training"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch_idx + 1
        self.pace.count_step()
        if (allowance := getattr(pl_module, "allowance", None)) is not None and not self.n_epochs:
            share = allowance.share(pl_module)
            self.pace.n_steps = max(self.pace.step, round(self.pace.step / share)) if share > 0 else 0
        if self._live is not None and (now := time.monotonic()) - self._read_at > 1 / HERTZ:
            self._read_at = now
            self.terms = read_terms(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.phase = "validating"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.phase = "training"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.phase = "consolidating and evaluating"

    # -- what is shown -----------------------------------------------------------------------------------------------
    def render(self) -> RenderableType:
        """The live part: two or three lines."""
        if self.info is None:
            return self._with_spinner(Text(self.phase))
        head = Text.assemble(
            ("experience ", ""),
            (f"{self.info.index + 1}/{self.n_experiences}", "bold"),
            f"  {self._classes(self.info)}",
        )
        head.truncate(max(self.console.width - 3, 10), overflow="ellipsis")
        left = self.pace.seconds_left()
        bar = Table.grid(padding=(0, 2, 0, 0))
        total = max(self.pace.n_steps, self.pace.step, 1)
        of = f"/{self.n_epochs}" if self.n_epochs else ""
        epoch = f"epoch {self.epoch + 1}{of}" if self.n_batches else self.phase
        batch = f"batch {self.batch}/{self.n_batches}" if self.n_batches else ""
        bar.add_row(
            ProgressBar(total=total, completed=self.pace.step, width=min(24, self.console.width // 3)),
            epoch, batch, Text("" if left is None else f"{left_text(left)} left", style="cyan"),
        )  # fmt: skip
        lines: list[RenderableType] = [self._with_spinner(head), bar]
        if self.phase == "training" and self.terms:
            lines.append(self._terms())
        elif self.phase != "preparing" or self.n_epochs:
            lines.append(Text(self.phase, style="dim"))
        return Group(*lines)

    def _with_spinner(self, text: Text) -> RenderableType:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(self._spinner, text)
        return grid

    def _terms(self) -> Text:
        text = Text()
        for name, value in self.terms.items():
            text.append(f"{name} ", style="dim").append(f"{value:.4g}   ", style="red" if math.isnan(value) else "")
        text.truncate(self.console.width, overflow="ellipsis")
        return text

    def _classes(self, info: ExperienceInfo) -> str:
        names = [self.class_names[c] for c in info.classes if c < len(self.class_names)]
        shown = ", ".join(names)
        return shown if len(shown) <= 60 else f"{', '.join(names[:3])}, … ({len(names)} classes)"

    def _print(self, index: int, row: Sequence[float | None], seconds: float) -> None:
        self.console.print(self._line(index, row, seconds), highlight=False, soft_wrap=self._live is None)

    def _line(self, index: int, row: Sequence[float | None], seconds: float) -> Text:
        """`✓ experience 2/5  mean 89.1 %  │ 81.0 97.1   ·   ·   ·  9.4 s`"""
        n = f"{index + 1:>{len(str(self.n_experiences))}}/{self.n_experiences}"
        seen = [v for v in row[: index + 1] if v is not None]
        unit = " %" if is_share(self.metric) else ""
        mean = cell_text(sum(seen) / len(seen) if seen else None, self.metric)
        text = Text.assemble(("✓ ", "green"), f"experience {n}  ", "mean ", (f"{mean:>5}{unit}", "bold"), "  │ ")
        time_text = f"  {duration(seconds)}"
        # Where the terminal is too narrow for the whole row its latest cells are the ones that say most.
        cells = [(cell_text(v, self.metric), v) for v in row]
        room = max((self.console.width - text.cell_len - len(time_text) - 2) // 6, 1) if self._live else len(cells)
        first = max(min(index + 1, len(cells)) - room, 0)
        if first:
            text.append("… ", style="dim")
        for cell, value in cells[first : first + room]:
            colour = heat(value) if value is not None and is_share(self.metric) else ""
            text.append(f"{cell:>5}", style=colour or "dim").append(" ")
        return text.append(time_text, style="dim")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None, "console": None}  # spawned processes show nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, console=Console(quiet=True), enabled=False)


def read_terms(module: LightningModule) -> dict[str, float]:
    """The loss terms of the last batch, in one transfer."""
    import torch

    terms = getattr(module, "last_terms", {})
    if not terms:
        return {}
    values = torch.stack([value.detach().reshape(()).float() for value in terms.values()]).tolist()
    return dict(zip(terms, values, strict=True))
