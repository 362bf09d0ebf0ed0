"""Classifier with several proxies of each class (Douillard et al. 2020, "PODNet", Eq. 7, LSC), and its loss (Eq. 8, NCA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LocalSimilarity(nn.Module):
    """Logits η ŷ_c,  ŷ_c = Σ_k s_{c,k} ⟨θ_{c,k}, h⟩,  s_{c,·} = softmax_k ⟨θ_{c,k}, h⟩,  θ and h of length 1.

    Args:
        feature_size: D.
        n_proxies: of each class.
        scale: initial η; its logarithm is learned, so that it stays positive (features that are still far from all proxies
            pull it down).
    """

    def __init__(self, *, feature_size: int, n_proxies: int, scale: float) -> None:
        super().__init__()
        self.feature_size, self.n_proxies = feature_size, n_proxies
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.weight = nn.Parameter(torch.zeros(0, n_proxies * feature_size))  # [K, P · D]

    @property
    def scale(self) -> Tensor:
        """η"""
        return self.log_scale.exp()

    def grow(self, n_classes: int) -> None:
        """Make room for so many classes, with random proxies of length 1 or so; idempotent."""
        n_old = len(self.weight)
        if n_classes > n_old:
            new = torch.randn(n_classes - n_old, self.weight.shape[1]).to(self.weight) / self.feature_size**0.5
            self.weight = nn.Parameter(torch.cat([self.weight.detach(), new]))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] → logits [B, K]."""
        proxies = F.normalize(self.weight.view(-1, self.feature_size), dim=1)
        cosine = F.linear(F.normalize(features, dim=1), proxies).view(len(features), -1, self.n_proxies)
        return self.scale * (cosine.softmax(2) * cosine).sum(2)

    @torch.no_grad()
    def imprint(self, label: int, features: Tensor, generator: torch.Generator) -> None:
        """Put the proxies of a class where its features [N, D] are; the rest stay random if there are fewer."""
        centers = k_means(F.normalize(features, dim=1), self.n_proxies, generator)
        self.weight[label].view(self.n_proxies, -1)[: len(centers)] = centers.to(self.weight)


def k_means(x: Tensor, k: int, generator: torch.Generator, steps: int = 20) -> Tensor:
    """Spherical k-means: k centers of length 1 (N, if N < k) among N points of length 1, [N, D]."""
    centers = x[torch.randperm(len(x), generator=generator)[:k].to(x.device)]
    for _ in range(steps):
        nearest = (x @ centers.T).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, x)
        empty = torch.bincount(nearest, minlength=len(centers)) == 0
        centers = torch.where(empty[:, None], centers, F.normalize(sums, dim=1))
    return centers


def nca_loss(logits: Tensor, labels: Tensor, scale: Tensor, margin: float) -> Tensor:
    """[ − log exp(η (ŷ_y − δ)) / Σ_{i≠y} exp η ŷ_i ]_+, mean over the batch.

    Args:
        logits: η ŷ [B, K].
        scale: η.
        margin: δ.
    """
    own = logits.gather(1, labels[:, None])[:, 0] - scale * margin
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return (others - own).relu().mean()
