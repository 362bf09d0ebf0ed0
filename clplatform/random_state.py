"""The state of all random generators, to go on from where they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """Every random generator's state as tensors and plain values (loaded without unpickling)."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": list(map(_plain, random.getstate())),
        "ours": generator.get_state(),
    }


def set_random_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    generator.set_state(state["ours"].cpu())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
