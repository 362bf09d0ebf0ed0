"""How many threads PyTorch uses: small models are slower on several, because handing out the work costs more than it."""

from __future__ import annotations

import os

import torch
from torch import nn

# Multiply-adds of a batch's forward pass, in millions, from which a second thread pays (measured; see benchmarks/).
WORTH_A_THREAD = 100.0


def set_threads(threads: int | None, module: nn.Module, batch_size: int, tokens: int) -> int:
    """Set PyTorch's threads and return their number.

    None chooses by the size of the model and the batch, never by a measurement: the same configuration gives the same
    sums, in the same order, on machines with as many cores.

    Args:
        tokens: positions that a sample has inside the model (1: a vector).
    """
    limit = available()
    if threads is None:
        tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        weights = sum(p.numel() for p in module.parameters() if p.ndim == 2 and id(p) not in tables)
        work = weights * batch_size * tokens / 1e6
        threads = 1 if work < WORTH_A_THREAD else limit
    torch.set_num_threads(min(threads, limit))
    return torch.get_num_threads()


def available() -> int:
    """As many threads as `OMP_NUM_THREADS` says, else as there are cores for this process."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list: one number for each nested level
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
