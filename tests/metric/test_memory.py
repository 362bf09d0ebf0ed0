"""Peak memory of a run, and how many parameters it has trained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from strategies import from_page
from world import TinyStream, make_experiment, tiny_vit

from clplatform.metric.memory import CLEAR

SCRIPT = """
import torch
from clplatform.metric import memory
from clplatform.metric.memory import forget_peak, peak_memory
memory.WORTH = 0
cpu = torch.device("cpu")
start = peak_memory(cpu)
big = torch.ones(100_000_000)
high = peak_memory(cpu)
del big
kept = peak_memory(cpu)
forget_peak(cpu)
print(start, high, kept, peak_memory(cpu))
"""


@pytest.mark.skipif(not CLEAR.exists(), reason="not Linux")
def test_the_peak_of_a_run_is_not_that_of_the_run_before() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    start, high, kept, after = map(int, out.split())
    assert high - start > 390e6 and abs(kept - high) < 20e6
    assert after < high - 350e6


def test_parameters_that_were_trained_are_counted(tmp_path: Path) -> None:
    def trained(name: str) -> tuple[float, int, int]:
        experiment = make_experiment(tmp_path / name, {name: from_page(name)}, stream=TinyStream(), backbone=tiny_vit())
        cost = experiment.run().cost
        parts = experiment.learner.backbone, experiment.learner.head
        return cost["trained_parameters"], *(sum(p.numel() for p in part.parameters()) for part in parts)  # type: ignore[return-value]

    n, backbone, head = trained("finetuning")
    assert n == backbone + head
    n, _, head = trained("linear_probe")
    assert n == head
    n, backbone, head = trained("l2p")
    assert head < n < backbone
