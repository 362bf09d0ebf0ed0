"""Learning-rate schedules over one stage, stepped once per optimizer step."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def schedule(
    optimizer: Optimizer,
    n_steps: int,
    *,
    kind: Literal["constant", "linear", "cosine"],
    warmup: Annotated[float, Ge(0), Le(1)],
) -> LRScheduler | None:
    """Hugging Face's schedule of this kind over `n_steps`; None where the rate never changes.

    Args:
        kind: what follows the warm-up.
        warmup: share of the steps in which the rate rises linearly from zero.
    """
    from transformers import get_scheduler  # slow to import, and not always needed

    if kind == "constant" and warmup == 0:
        return None
    name = "constant_with_warmup" if kind == "constant" else kind
    return get_scheduler(name, optimizer, num_warmup_steps=round(warmup * n_steps), num_training_steps=n_steps)
