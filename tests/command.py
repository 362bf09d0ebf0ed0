"""The command line, called in this process; and settings for runs of half a second."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clplatform.cli import main
from clplatform.experiment import Experiment

# Two experiences of scikit-learn's digits, two batches each.
TINY = [
    "backbone=mlp", "backbone.hidden=[16]", "stream.n_experiences=2", "trainer.max_epochs=1", "threads=1",
    "+trainer.limit_train_batches=2", "trainer.accelerator=cpu", "tracking=local",
]  # fmt: skip


@dataclass
class Done:
    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Done:
    """`clplatform <arguments>` in the current folder."""
    capsys.readouterr()
    with process_left_alone():
        code = main(list(arguments))
    out, err = capsys.readouterr()
    return Done(code, out, err)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """What the command line answers to what it refuses: checked to be one or two lines, with nothing begun and nothing
    written. Returned without its prefix."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    before = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "run", begun)
        done = call(capsys, *arguments)
    assert done.code == code, done.err
    assert done.out == ""
    lines = done.err.splitlines()
    assert 1 <= len(lines) <= 2, done.err
    assert all(line.startswith("clplatform: ") for line in lines), done.err
    assert everything() == before
    return "\n".join(line.removeprefix("clplatform: ") for line in lines)


def everything() -> dict[Path, bytes | None]:
    """Files, with their content, and folders under the current one; Python's cache of imported ones is not looked at."""
    paths = [path for path in Path.cwd().rglob("*") if "__pycache__" not in path.parts]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@contextmanager
def process_left_alone() -> Iterator[None]:
    """A process of its own would have ended with what a run changes in PyTorch and in logging."""
    root = logging.getLogger()
    handlers, level, threads = list(root.handlers), root.level, torch.get_num_threads()
    deterministic, cublas = torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        yield
    finally:
        root.handlers, root.level = handlers, level
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        if cublas is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def only_run() -> Path:
    """The directory of the only run there is."""
    (results,) = Path("outputs").glob("**/results.json")
    return results.parent
