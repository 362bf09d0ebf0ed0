"""Shared by all tests."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

# Models this small only wait for more threads, here and in the commands that tests start; sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Every trainer looks for plugins among all installed packages: a tenth of a tiny run.
importlib.metadata.entry_points = cache(importlib.metadata.entry_points)
sys.path.insert(0, str(Path(__file__).parent))  # `world`, the tiny world of the tests


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test writes into the repository or talks to a tracking server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    # What a test writes need not outlive the machine: waiting for the disk is half of the time of a tiny run.
    monkeypatch.setattr(os, "fsync", lambda _: None)
