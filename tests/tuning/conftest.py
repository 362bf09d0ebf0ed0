"""Shared by the tests of tunings."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Models this small are many times slower on several threads that wait for each other."""
    torch.set_num_threads(1)
