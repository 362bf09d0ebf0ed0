from __future__ import annotations

import io
import pickle
from collections.abc import Iterator

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from clplatform.tracking.terminal import TerminalProgress
from clplatform.types import ExperienceInfo

SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"  # the cursor


class Model(pl.LightningModule):
    def __init__(self, fail_at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.fail_at, self.error, self.last_terms = fail_at, error, {}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fail_at:
            raise self.error("stop")
        loss = self.layer(batch[0]).square().mean()
        self.last_terms = {"loss": loss.detach(), "ewc": torch.tensor(0.125)}
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(progress: TerminalProgress, model: Model, epochs: int = 2) -> None:
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[progress], logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(6, 2)), batch_size=2))


def info(index: int) -> ExperienceInfo:
    classes = (2 * index, 2 * index + 1)
    return ExperienceInfo(index, f"{classes[0]}, {classes[1]}", index, classes, classes[1] + 1)


def make(*, terminal: bool, n: int = 3, width: int = 80) -> TerminalProgress:
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=width, color_system="truecolor" if terminal else None
    )
    return TerminalProgress(n, [f"class {c}" for c in range(2 * n)], console=console)


def output(progress: TerminalProgress) -> str:
    assert isinstance(progress.console.file, io.StringIO) or hasattr(progress.console.file, "getvalue")
    return progress.console.file.getvalue()  # type: ignore[attr-defined]


def drawn(progress: TerminalProgress) -> str:
    console = Console(file=io.StringIO(), width=progress.console.width, record=True)
    console.print(progress.render())
    return console.export_text()


pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's and torch's own remarks


def test_without_a_terminal_one_plain_line_per_experience() -> None:
    progress = make(terminal=False)
    with progress:
        for i in range(2):
            progress.start_experience(info(i), 6)
            fit(progress, Model())
            progress.finish_experience([1.0 - 0.5 * (i - j) if j <= i else None for j in range(3)])
    lines = output(progress).splitlines()
    assert len(lines) == 2 and "\x1b" not in "".join(lines)
    assert lines[0].startswith("✓ experience 1/3  mean 100.0 %  │ 100.0     ·     ·")
    assert lines[1].startswith("✓ experience 2/3  mean  75.0 %  │  50.0 100.0     ·")


def test_the_live_part_shows_experience_epoch_batch_terms_and_time() -> None:
    progress = make(terminal=True)
    with progress:
        assert "starting" in drawn(progress)
        progress.start_experience(info(1), 6)
        assert "experience 2/3  class 2, class 3" in drawn(progress) and "preparing" in drawn(progress)
        fit(progress, Model())
        progress.phase = "training"
        text = drawn(progress)
        assert "epoch 2/2" in text and "batch 3/3" in text and " left" in text
        assert "loss " in text and "ewc 0.125" in text


def test_one_display_serves_several_trainers_and_gives_the_terminal_back() -> None:
    progress = make(terminal=True)
    with progress:
        progress.start_experience(info(0), 12)
        for _ in range(2):  # two stages, each with its own Trainer
            fit(progress, Model())
        assert progress.pace.step == 12
        progress.finish_experience([1.0, None, None])
        progress.start_experience(info(1), 6)
    text = output(progress)
    assert text.count(HIDE) == 1 and text.rfind(SHOW) > text.rfind(HIDE)
    assert text.count("✓ ") == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_terminal_comes_back_after_an_exception(error: type[BaseException]) -> None:
    progress = make(terminal=True)

    def run() -> None:
        with progress:
            progress.start_experience(info(0), 6)
            fit(progress, Model(fail_at=1, error=error))

    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        run()
    text = output(progress)
    assert text.rfind(SHOW) > text.rfind(HIDE) >= 0
    progress.close()  # again: nothing happens
    assert output(progress) == text


def test_disabled_prints_nothing() -> None:
    progress = make(terminal=True)
    progress.enabled = False
    with progress:
        progress.start_experience(info(0), 6)
        fit(progress, Model())
        progress.finish_experience([1.0, None, None])
    assert output(progress) == ""


def test_the_loss_is_read_at_a_low_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter(range(1000))
    monkeypatch.setattr("clplatform.tracking.terminal.time.monotonic", lambda: next(times) / 40)  # 40 batches a second
    reads = []
    monkeypatch.setattr("clplatform.tracking.terminal.read_terms", lambda module: reads.append(1) or {})
    progress = make(terminal=True)
    progress._live = object()  # type: ignore[assignment]  # as if shown; no thread that asks for the time
    trainer, model = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), Model()
    for i in range(40):
        progress.on_train_batch_end(trainer, model, None, None, i)
    assert 3 <= len(reads) <= 5


def test_a_narrow_terminal_shows_the_latest_cells() -> None:
    progress = make(terminal=True, n=30, width=80)
    with progress:
        progress.start_experience(info(19), 6)
        progress.finish_experience([0.01 * j if j < 20 else None for j in range(30)])
    line = next(line for line in output(progress).splitlines() if "✓" in line)
    assert "20/30" in line and "… " in line and "19.0" in line and " 1.0" not in line


def test_a_resumed_run_shows_what_it_has_finished() -> None:
    progress = make(terminal=False)
    progress.show_finished([[1.0, None, None], [0.5, 0.75, None]], [3.0, 5.0])
    lines = output(progress).splitlines()
    assert [line.split()[2] for line in lines] == ["1/3", "2/3"]
    assert lines[1].startswith("✓ experience 2/3  mean  62.5 %  │  50.0  75.0     ·") and lines[1].endswith("5.0 s")


def test_more_data_than_expected_lengthens_the_bar() -> None:
    progress = make(terminal=True)
    with progress:
        progress.start_experience(info(0), 2)  # of its own data; the strategy trains on more
        fit(progress, Model())
        assert (progress.pace.step, progress.pace.n_steps) == (6, 6)


def test_a_log_in_ascii_does_not_stop_a_run() -> None:
    raw = io.BytesIO()
    progress = TerminalProgress(
        3, ["Käse"] * 6, console=Console(file=io.TextIOWrapper(raw, encoding="ascii", line_buffering=True))
    )
    progress.start_experience(info(0), 6)
    progress.finish_experience([1.0, None, None])
    assert raw.getvalue().startswith(b"? experience 1/3  mean 100.0 %  ? 100.0")


def test_it_can_be_sent_to_another_process() -> None:
    progress = make(terminal=True)
    with progress:
        copy = pickle.loads(pickle.dumps(progress))
    assert not copy.enabled and copy.n_experiences == 3
