"""Peak memory of a run, though its process may have made other runs before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
from pathlib import Path

import torch

WORTH = (
    2 << 30
)  # bytes; a process that never held more holds little beside its libraries, and collecting takes half a second
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


def forget_peak(device: torch.device) -> None:
    """Count the peak from now on, after giving back to the system what is free, if it was above `WORTH`. Where the system
    cannot (not Linux, or not allowed), the peak of the process stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if peak_memory(device) < WORTH:
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
        CLEAR.write_text("5")  # see proc(5): the peak resident set size becomes the present one


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU of tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
