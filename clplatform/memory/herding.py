"""Herding: exemplars whose mean is close to their class's (Rebuffi et al. 2017, "iCaRL", Alg. 4; Welling 2009).

    p_k = argmin_{x ∈ X} ‖ μ − 1/k [φ(x) + Σ_{j<k} φ(p_j)] ‖,  k = 1 … n

φ are L2-normalised features and μ is their mean over the class. As in the authors' code the means are not normalised
again (the text does), so that a prefix of the exemplars approaches μ; no sample is chosen twice. The order is part of
the result: with room for fewer exemplars the first ones stay (Alg. 5).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clplatform.memory.buffer import Buffer
from clplatform.types import Data


def herding(features: Tensor, labels: Tensor, n: int) -> Tensor:
    """In which place each sample is chosen for its class.

    Args:
        features: [N, D], normalised here; of samples that are not augmented, from a model in eval mode.
        labels: classes, int64 [N].
        n: exemplars of each class (all of its samples if there are fewer).

    Returns:
        int64 [N] on the CPU: 0 is its class's first exemplar; N: not among the first `n`.
    """
    features, labels = F.normalize(features, dim=1), labels.to(features.device)
    place = torch.full((len(labels),), len(labels))
    # One class after the other: exemplars are found one by one anyway, and padding classes to one size is slower.
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        order = _greedy(features[rows], n)
        place[rows.cpu()[order]] = torch.arange(len(order))
    return place


def _greedy(features: Tensor, n: int) -> Tensor:
    """Positions of the first `n` exemplars among one class's normalised features [M, D], in order, on the CPU."""
    # ‖kμ − Σ_{j<k} φ(p_j) − φ(x)‖² is smallest where φ(x)·(kμ − Σ φ(p_j)) − ½‖φ(x)‖² is largest.
    mean = features.mean(0)
    direction, offset, order = mean.clone(), features.square().sum(1) / -2, []
    for _ in range(min(n, len(features))):
        best = (features @ direction + offset).argmax()
        offset[best] = -torch.inf  # chosen once
        direction += mean - features[best]
        order.append(best)
    return torch.stack(order).cpu() if order else torch.zeros(0, dtype=torch.int64)


def add_herded(buffer: Buffer, data: Data, features: Tensor, generator: torch.Generator) -> None:
    """Let the samples of `data`, with these features [N, D], compete for a `class_balanced` buffer in the order in which
    herding chooses them. A class whose samples come in several parts keeps exemplars of each part."""
    buffer.add_ranked(data, herding(features, data.labels, buffer.share(data.labels)), generator)
