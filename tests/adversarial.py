"""What tests of adversarial training share: a linear model of texts, written out too, and its runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from naive import Recorder
from strategies import from_page
from text_world import INPUT, TinyTextStream
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyBackbone, make_experiment

from clplatform.strategy.base import Strategy
from clplatform.types import Batch

SIZE = TinyBackbone.feature_size
Perturb = Callable[["Written", Batch], Tensor]  # → [B, T, D]


class Bag(nn.Module):
    """The mean of a text's token vectors (that are not padding), dropped out."""

    feature_size, n_tokens, source = SIZE, 9, "random"

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        assert INPUT.vocab_size is not None
        self.embeddings = nn.ModuleDict({"token": nn.Embedding(INPUT.vocab_size, SIZE)})
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        weight = batch["attention_mask"][:, :, None].float()
        return self.dropout((self.embeddings["token"](batch["input_ids"]) * weight).sum(1) / weight.sum(1))

    def blocks(self) -> list[Any]:
        return [self.embeddings]

    def save_assets(self, folder: Path) -> None: ...


def run(folder: Path, *strategies: tuple[str, Strategy], **options: Any) -> tuple[Any, Recorder]:
    """A finished run of a bag of words with these strategies, and a recorder of what batches are at their end."""
    recorder = Recorder()
    options.setdefault("stream", TinyTextStream(2))
    options.setdefault("backbone", Bag())
    experiment = make_experiment(folder, {**dict(strategies), "recorder": recorder}, **options)
    experiment.run()
    return experiment, recorder


class Written:
    """The bag of words written out: logits = W mean(E[ids]) + b."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        self.E = start["backbone.embeddings.token.weight"].clone().requires_grad_()
        self.W = start["head.linear.weight"].clone().requires_grad_()
        self.b = start["head.linear.bias"].clone().requires_grad_()

    def grow(self, start: dict[str, Tensor]) -> None:
        for name in ("W", "b"):
            old, new = getattr(self, name).detach(), start[f"head.linear.{'weight' if name == 'W' else 'bias'}"]
            setattr(self, name, torch.cat([old, new[len(old) :]]).requires_grad_())

    def logits(self, batch: Batch, perturbation: Tensor | float = 0.0) -> Tensor:
        mask = batch["attention_mask"][:, :, None].float()
        mean = ((self.E[batch["input_ids"]] + perturbation) * mask).sum(1) / mask.sum(1)
        return mean @ self.W.T + self.b

    def uphill(self, batch: Batch, perturbation: Tensor | float = 0.0) -> Tensor:
        """Gradient of a sample's loss by each of its token vectors, [B, T, D]: Wᵀ (softmax(z) − y) / l, for all alike."""
        mask = batch["attention_mask"][:, :, None].float()
        z = self.logits(batch, perturbation).detach()
        error = z.softmax(1) - F.one_hot(batch["labels"], z.shape[1])
        return (error @ self.W.detach())[:, None] / mask.sum(1, keepdim=True) * mask

    def train(self, batches: list[Batch], perturb: Perturb, strength: float) -> None:
        """SGD with momentum on ℓ(x) + λ ℓ(x + r)."""
        optimizer = torch.optim.SGD([self.E, self.W, self.b], lr=0.1, momentum=0.9)
        for batch in batches:
            optimizer.zero_grad()
            moved = self.logits(batch, perturb(self, batch))
            loss = F.cross_entropy(self.logits(batch), batch["labels"])
            (loss + strength * F.cross_entropy(moved, batch["labels"])).backward()
            optimizer.step()


def learn(recorder: Recorder, perturb: Perturb, strength: float = 1.0) -> Written:
    """The recorded run once more, written out."""
    model = Written(recorder.before[0])
    for start, batches in zip(recorder.before, recorder.batches, strict=True):
        model.grow(start)
        model.train(batches, perturb, strength)
    return model


def close(model: Written, learner: Any) -> None:
    """The weights of both are equal up to rounding."""
    found = learner.state_dict()
    for name, expected in (
        ("backbone.embeddings.token.weight", model.E), ("head.linear.weight", model.W), ("head.linear.bias", model.b),
    ):  # fmt: skip
        torch.testing.assert_close(
            found[name], expected.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def replay() -> tuple[str, Strategy]:
    return "replay", from_page("replay", capacity=20)
