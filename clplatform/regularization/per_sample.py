"""Magnitudes of the gradients of single samples, averaged: what Fisher information and MAS are made of.

    M_i = 1/N Σ_n w_n · m( ∂ s(x_n, θ) / ∂θ_i )

with a scalar s of the model's output for one sample and a magnitude m (square, absolute value). m is taken sample by
sample: that of a batch's mean gradient is something else, and much smaller.

Gradients of single samples are made by vectorising over batches of one. A model whose trainable parameters are all those
of linear layers that see one vector a sample (a perceptron) needs none of them: there ∂s_n/∂W = g_n h_nᵀ with the
gradient g_n at the layer's output and its input h_n, so that for a magnitude with m(ab) = m(a) m(b)

    Σ_n w_n · m(g_n h_nᵀ) = (w · m(g))ᵀ m(h)

(Goodfellow 2015, "Efficient Per-Example Gradient Computations").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from clplatform.module.mode import eval_mode
from clplatform.types import Batch, Data, Output

if TYPE_CHECKING:
    from clplatform.learner import Learner

Named = dict[str, Tensor]
Scalar = Callable[[Output, Batch], Tensor]  # (output for one sample, its row as a batch of one) → scalar
Magnitude = Callable[[Tensor], Tensor]  # square or absolute value: m(ab) = m(a) m(b)
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
    with eval_mode(learner), torch.autocast(learner.device.type, enabled=False):
        for batch in learner.batches(data, batch_size=_chunk(learner, parameters)):
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
    with eval_mode(learner), torch.autocast(learner.device.type, enabled=False):
        for start in range(0, n, chunk := _chunk(learner, parameters)):
            rows = {name: value[start : start + chunk] for name, value in batch.items()}
            for inputs, weights in _once(rows):
                _add(total, learner, parameters, inputs, weights, scalar, magnitude)
    return {name: value / n for name, value in total.items()}


def _trainable(learner: Learner) -> Named:
    return {name: p.detach() for name, p in learner.named_parameters() if p.requires_grad}


def _chunk(learner: Learner, parameters: Named) -> int:
    """Samples whose gradients are held at once."""
    if _linear_layers(learner, parameters) is not None:
        return 256
    return max(1, min(256, CHUNK_FLOATS // max(1, sum(p.numel() for p in parameters.values()))))


def _once(batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
    yield batch, torch.ones(len(batch["labels"]), device=batch["labels"].device)


def _linear_layers(learner: Learner, parameters: Named) -> dict[str, nn.Linear] | None:
    """The layers by name, if all trainable parameters are those of linear layers."""
    owners = {name.rpartition(".")[0] for name in parameters}
    layers = {name: m for name, m in learner.named_modules() if name in owners and type(m) is nn.Linear}
    return layers if layers.keys() == owners and not getattr(learner, "linear_failed", False) else None


def _add(
    total: Named, learner: Learner, parameters: Named, inputs: Batch, weights: Tensor, scalar: Scalar,
    magnitude: Magnitude,
) -> None:  # fmt: skip
    """Add Σ_b weight_b · m(∂s(x_b)/∂θ) to `total`, by name."""
    layers = _linear_layers(learner, parameters)
    if layers is not None and _add_linear(total, learner, layers, inputs, weights, scalar, magnitude):
        return
    for rows in torch.arange(len(weights)).split(_chunk(learner, parameters)):  # smaller than by layers
        part = {name: value[rows] for name, value in inputs.items()} if len(rows) < len(weights) else inputs
        vectorise = len(rows) > 1 and not getattr(learner, "vmap_failed", False)
        if not (vectorise and _add_vectorised(total, learner, parameters, part, weights[rows], scalar, magnitude)):
            _add_one_by_one(total, learner, part, weights[rows], scalar, magnitude)


def _add_linear(
    total: Named, learner: Learner, layers: dict[str, nn.Linear], inputs: Batch, weights: Tensor, scalar: Scalar,
    magnitude: Magnitude,
) -> bool:  # fmt: skip
    """By the outer product of what each layer reads and the gradient at what it gives. False: a layer is called more
    than once, or on more than a vector a sample, or its weights are used elsewhere; nothing has been added then."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(lambda _, args, out, seen=calls[name]: seen.append((args[0].detach(), out)))
        for name, layer in layers.items()
    ]
    try:
        output = learner(inputs)
    finally:
        for handle in handles:
            handle.remove()
    used = {name: seen for name, seen in calls.items() if seen}
    if any(len(seen) > 1 or seen[0][0].shape[:-1] != weights.shape for seen in used.values()):
        return _not_linear(learner)

    def of_row(logits: Tensor, features: Tensor, row: Batch) -> Tensor:
        return scalar(Output(logits[None], features[None]), {name: value[None] for name, value in row.items()})

    try:
        values = vmap(of_row)(output.logits, output.features, inputs)
    except RuntimeError:
        return _not_linear(learner)
    outs, own = [seen[0][1] for seen in used.values()], [p for p in learner.parameters() if p.requires_grad]
    # The sum's gradient both ways: they differ where weights are used outside their layer.
    found = torch.autograd.grad(values.sum(), [*outs, *own], allow_unused=True)
    at_output, whole = dict(zip(used, found, strict=False)), dict(zip(map(id, own), found[len(outs) :], strict=True))
    added: Named = {}
    for name, layer in layers.items():
        g = at_output.get(name)
        h = used[name][0][0] if name in used else None
        for part, p in layer.named_parameters():
            if not p.requires_grad:
                continue
            sum_of_all = whole[id(p)]
            if g is None or h is None:
                if sum_of_all is not None:
                    return _not_linear(learner)
                continue
            w = weights.to(g.dtype)[:, None]
            mine, size = (g.T @ h, (w * magnitude(g)).T @ magnitude(h)) if part == "weight" else (
                g.sum(0), (w * magnitude(g)).sum(0))  # fmt: skip
            if sum_of_all is None or not torch.allclose(mine, sum_of_all, rtol=1e-3, atol=1e-5 * float(g.abs().sum())):
                return _not_linear(learner)
            added[f"{name}.{part}"] = size
    for name, size in added.items():
        total[name] += size
    return True


def _not_linear(learner: Learner) -> bool:
    learner.linear_failed = True  # type: ignore[assignment]
    return False


def _add_vectorised(
    total: Named, learner: Learner, parameters: Named, inputs: Batch, weights: Tensor, scalar: Scalar,
    magnitude: Magnitude,
) -> bool:  # fmt: skip
    """The batch as B batches of one, vectorised. False: the model does not allow it (data-dependent control flow,
    operators without a batching rule); nothing has been added then."""

    def of_one(values: Named, row: Batch) -> Tensor:
        single = {name: value[None] for name, value in row.items()}
        return scalar(functional_call(learner, values, (single,)), single)

    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradients = vmap(torch.func.grad(of_one), in_dims=(None, 0))(parameters, inputs)
    except RuntimeError:
        learner.vmap_failed = True  # type: ignore[assignment]
        return False
    for name, g in gradients.items():
        total[name] += torch.einsum("b,b...->...", weights.to(g.dtype), magnitude(g))
    return True


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
