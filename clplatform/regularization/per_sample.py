"""Magnitudes of the gradients of single samples, averaged: what Fisher information and MAS are made of.

    M_i = 1/N Σ_n w_n · m( ∂ s(x_n, θ) / ∂θ_i )

with a scalar s of the model's output for one sample and a magnitude m (square, absolute value). m is taken sample by
sample: that of a batch's mean gradient is something else, and much smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from clplatform.types import Batch, Data, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

Named = dict[str, Tensor]
Scalar = Callable[[Output, Batch], Tensor]  # (output for one sample, its row as a batch of one) → scalar
Magnitude = Callable[[Tensor], Tensor]
Passes = Callable[[Batch], Iterable[tuple[Batch, Tensor]]]  # batch → rows to take gradients at, their weights [B]

# Floats of per-sample gradients held at once: bounds memory, and larger chunks are hardly faster on a CPU.
CHUNK_FLOATS = 2**24


def mean_over_data(
    learner: Learner,
    data: Data,
    scalar: Scalar,
    magnitude: Magnitude,
    *,
    samples: int | None = None,
    passes: Passes | None = None,
) -> Named:
    """Mean over the samples of `data`, for the trainable parameters by name.

    The model runs in eval mode and is left as it was, batch-norm statistics included.

    Args:
        samples: use so many, drawn without repetition with the learner's generator; None: all.
        passes: the gradients to sum for each batch; None: one for each row.
    """
    n = len(data)
    rows = torch.arange(n) if samples is None else torch.randperm(n, generator=learner.generator)[:samples]
    data, parameters = data.select(rows), _trainable(learner)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with _as_in_evaluation(learner):
        for batch in learner.batches(data, batch_size=_chunk(parameters)):
            for inputs, weights in _once(batch) if passes is None else passes(batch):
                _add(total, learner, parameters, inputs, weights, scalar, magnitude)
    return {name: value / max(1, len(data)) for name, value in total.items()}


def mean_over_batch(learner: Learner, batch: Batch, scalar: Scalar, magnitude: Magnitude) -> Named:
    """Mean over the rows of `batch`, for the trainable parameters by name; the model is left as it was.

    May be called between a step's forward and backward pass: it draws no random numbers.
    """
    n, parameters = len(batch["labels"]), _trainable(learner)
    # Beside replayed rows, a column may hold only the stream's.
    batch = {name: value for name, value in batch.items() if len(value) == n}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with _as_in_evaluation(learner):
        for start in range(0, n, chunk := _chunk(parameters)):
            rows = {name: value[start : start + chunk] for name, value in batch.items()}
            for inputs, weights in _once(rows):
                _add(total, learner, parameters, inputs, weights, scalar, magnitude)
    return {name: value / n for name, value in total.items()}


def _trainable(learner: Learner) -> Named:
    return {name: p.detach() for name, p in learner.named_parameters() if p.requires_grad}


def _chunk(parameters: Named) -> int:
    """Samples whose gradients are held at once."""
    return max(1, min(256, CHUNK_FLOATS // max(1, sum(p.numel() for p in parameters.values()))))


def _once(batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
    yield batch, torch.ones_like(batch["labels"], dtype=torch.float32)


@contextmanager
def _as_in_evaluation(learner: Learner) -> Iterator[None]:
    """Eval mode and full precision inside; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in learner.modules()}
    learner.eval()
    try:
        with torch.autocast(learner.device.type, enabled=False):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _add(
    total: Named, learner: Learner, parameters: Named, inputs: Batch, weights: Tensor, scalar: Scalar,
    magnitude: Magnitude,
) -> None:  # fmt: skip
    """Add Σ_b weight_b · m(∂s(x_b)/∂θ) to `total`, by name.

    The batch is run as B batches of one, vectorised; some models do not allow it (data-dependent control flow,
    operators without a batching rule), and for these one sample after the other.
    """
    if len(weights) == 1 or getattr(learner, "vmap_failed", False):
        return _add_one_by_one(total, learner, inputs, weights, scalar, magnitude)

    def of_one(values: Named, row: Batch) -> Tensor:
        single = {name: value[None] for name, value in row.items()}
        return scalar(functional_call(learner, values, (single,)), single)

    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradients = vmap(torch.func.grad(of_one), in_dims=(None, 0))(parameters, inputs)
    except RuntimeError:
        learner.vmap_failed = True  # type: ignore[assignment]
        return _add_one_by_one(total, learner, inputs, weights, scalar, magnitude)
    for name, g in gradients.items():
        total[name] += torch.einsum("b,b...->...", weights.to(g.dtype), magnitude(g))


def _add_one_by_one(
    total: Named, learner: Learner, inputs: Batch, weights: Tensor, scalar: Scalar, magnitude: Magnitude
) -> None:
    named = {name: p for name, p in learner.named_parameters() if name in total}
    for b in range(len(weights)):
        row = {name: value[b : b + 1] for name, value in inputs.items()}
        gradients = torch.autograd.grad(scalar(learner(row), row), list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                total[name].addcmul_(magnitude(gradient), weights[b].to(gradient.dtype))
