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
    available = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    if threads is None:
        tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        weights = sum(p.numel() for p in module.parameters() if p.ndim == 2 and id(p) not in tables)
        work = weights * batch_size * tokens / 1e6
        threads = 1 if work < WORTH_A_THREAD else available
    torch.set_num_threads(min(threads, available))
    return torch.get_num_threads()
