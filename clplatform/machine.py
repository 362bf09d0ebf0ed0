"""Can this machine, and Lightning, do what is asked for? Tried before anything is trained."""

from __future__ import annotations

import warnings

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from clplatform.fitting import Fitter
from clplatform.types import ClplatformError


def check_trainer(fitter: Fitter) -> None:
    """Let Lightning look at its settings before anything is trained.

    Raises:
        ClplatformError: it refuses them, or would take others instead.
    """
    try:
        with warnings.catch_warnings():
            # It would train in bfloat16 instead of the half precision that is asked for.
            warnings.filterwarnings("error", message=".*fp16 is not supported on CPU.*")
            trainer = fitter.make_trainer()
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError, UserWarning) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ClplatformError(f"trainer: {reason} (see trainer.* in `clplatform --cfg job`)") from None
    if trainer.world_size > 1:
        raise ClplatformError(
            f"trainer.devices={fitter.trainer.get('devices')}: a run trains on one device: give trainer.devices=1 (or a "
            "list of one: trainer.devices=[1]); several runs of a sweep can use a device each"
        )


def check_device(path: str, device: str) -> None:
    """Can tensors be put there?

    Raises:
        ClplatformError: they cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # AssertionError: PyTorch is built without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ClplatformError(f"{path}={device}: {reason}; cpu is always there") from None
