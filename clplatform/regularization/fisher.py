"""The diagonal of the Fisher information, from per-sample gradients.

    F_i = 1/N Σ_n E_y [ (∂ log p(y|x_n, θ) / ∂θ_i)² ]

with the expectation over y taken exactly over all classes (`exact`), by one label drawn from the model
(`sampled`), or at the true label (`empirical`). van de Ven (2025, "On the Computation of the Fisher Information
in Continual Learning") compares them. The gradient is squared sample by sample: the square of a batch's mean
gradient is something else, tens of times smaller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F

from clplatform.types import Batch, Data

if TYPE_CHECKING:
    from clplatform.learner import Learner

Kind = Literal["exact", "sampled", "empirical"]

# Floats of per-sample gradients held at once: bounds memory, and larger chunks are hardly faster on a CPU.
CHUNK_FLOATS = 2**24


def fisher_diagonal(learner: Learner, data: Data, kind: Kind, samples: int | None = None) -> dict[str, Tensor]:
    """Diagonal Fisher information of the trainable parameters, by name.

    The model runs in eval mode and is left as it was, batch-norm statistics included.

    Args:
        samples: use so many, drawn without repetition with the learner's generator; None: all.
    """
    n = len(data)
    rows = torch.arange(n) if samples is None else torch.randperm(n, generator=learner.generator)[:samples]
    data = data.select(rows)
    parameters = {name: p.detach() for name, p in learner.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    outputs = learner.n_classes if kind == "exact" else 1
    chunk = max(1, min(256, CHUNK_FLOATS // (outputs * max(1, sum(p.numel() for p in parameters.values())))))
    was_training = learner.training
    learner.eval()
    try:
        for batch in learner.batches(data, batch_size=chunk):
            labels, weights = _labels(learner, batch, kind)
            for k in range(labels.shape[1]):
                squared = _squared_gradients(learner, parameters, batch, labels[:, k], weights[:, k])
                for name, value in squared.items():
                    total[name] += value
    finally:
        learner.train(was_training)
    return {name: value / max(1, len(data)) for name, value in total.items()}


@torch.no_grad()
def _labels(learner: Learner, batch: Batch, kind: Kind) -> tuple[Tensor, Tensor]:
    """Labels [B, L] to take the gradient at, and their weights [B, L] in the expectation."""
    if kind == "empirical":
        labels = batch["labels"][:, None]
        return labels, torch.ones_like(labels, dtype=torch.float32)
    probabilities = learner(batch).logits.float().softmax(1)
    if kind == "exact":
        return torch.arange(probabilities.shape[1], device=probabilities.device).expand_as(probabilities), probabilities
    labels = torch.multinomial(probabilities.cpu(), 1, generator=learner.generator).to(probabilities.device)
    return labels, torch.ones_like(labels, dtype=torch.float32)


def _squared_gradients(
    learner: Learner, parameters: dict[str, Tensor], batch: Batch, labels: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Σ_b weight_b · (∂ log p(label_b|x_b)/∂θ)², by name.

    The batch is run as B batches of one, vectorised; some models do not allow it (data-dependent control flow,
    operators without a batching rule), and for these one sample after the other.
    """
    inputs = {**batch, "labels": labels}
    if getattr(learner, "vmap_failed", False):
        return _one_by_one(learner, parameters, inputs, weights)

    def loss(values: dict[str, Tensor], row: Batch) -> Tensor:
        single = {name: value[None] for name, value in row.items()}
        logits = functional_call(learner, values, (single,)).logits
        return F.cross_entropy(logits.float(), single["labels"])

    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradients = vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    except RuntimeError:
        learner.vmap_failed = True  # type: ignore[assignment]
        return _one_by_one(learner, parameters, inputs, weights)
    return {name: torch.einsum("b,b...->...", weights.to(g.dtype), g**2) for name, g in gradients.items()}


def _one_by_one(learner: Learner, parameters: dict[str, Tensor], inputs: Batch, weights: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in learner.named_parameters() if name in parameters}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for b in range(len(inputs["labels"])):
        row = {name: value[b : b + 1] for name, value in inputs.items()}
        loss = F.cross_entropy(learner(row).logits.float(), row["labels"])
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                total[name] += weights[b] * gradient**2
    return total
