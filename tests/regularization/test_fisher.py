"""The Fisher diagonal against sample-by-sample autograd and a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from world import TinyStream, make_learner

from clplatform.regularization.fisher import fisher_diagonal, fisher_of_batch
from clplatform.strategy.finetuning import Finetuning


@pytest.fixture
def learner():
    stream = TinyStream()
    learner = make_learner(stream, {"finetuning": Finetuning()}, dropout=0.3)
    for e in stream.experiences[:2]:
        learner.build(e.info)
    return learner


def by_hand(learner, data, kind: str) -> dict[str, torch.Tensor]:
    learner.eval()
    total = {n: torch.zeros_like(p) for n, p in learner.named_parameters()}
    for i in range(len(data)):
        batch = data.fetch(torch.tensor([i]))
        log_p = F.log_softmax(learner(batch).logits, 1)[0]
        labels = range(len(log_p)) if kind == "exact" else [int(batch["labels"])]
        for y in labels:
            gradients = torch.autograd.grad(log_p[y], list(learner.parameters()), retain_graph=True)
            weight = log_p[y].exp().item() if kind == "exact" else 1.0
            for name, g in zip(total, gradients, strict=True):
                total[name] += weight * g**2 / len(data)
    return total


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_equals_autograd_sample_by_sample(learner, kind: str) -> None:
    data = TinyStream()[1].train
    expected = by_hand(learner, data, kind)
    for name, value in fisher_diagonal(learner, data, kind).items():  # type: ignore[arg-type]
        torch.testing.assert_close(value, expected[name])


def test_of_a_batch_is_the_empirical_one_of_its_rows(learner) -> None:
    data = TinyStream()[1].train
    expected = fisher_diagonal(learner, data, "empirical")
    for name, value in fisher_of_batch(learner, data.fetch(torch.arange(len(data)))).items():
        torch.testing.assert_close(value, expected[name])


def test_closed_form_of_a_linear_softmax(learner) -> None:
    """For logits Wh + b the bias's Fisher is E[p_k (1 − p_k)]."""
    data = TinyStream()[0].train
    fisher = fisher_diagonal(learner, data, "exact")
    with torch.no_grad():
        p = learner.eval()(data.fetch(torch.arange(len(data)))).logits.softmax(1)
    torch.testing.assert_close(fisher["head.linear.bias"], (p * (1 - p)).mean(0))


def test_sampled_approaches_exact(learner) -> None:
    data = TinyStream(per_class=600)[0].train
    exact, sampled = (fisher_diagonal(learner, data, k)["head.linear.bias"] for k in ("exact", "sampled"))
    torch.testing.assert_close(sampled, exact, rtol=0.25, atol=0.02)


def test_not_the_square_of_the_mean_gradient(learner) -> None:
    """Avalanche's mistake makes it tens of times smaller."""
    data = TinyStream()[1].train
    batch = data.fetch(torch.arange(len(data)))
    loss = F.cross_entropy(learner.eval()(batch).logits, batch["labels"])
    mean = torch.autograd.grad(loss, list(learner.parameters()))
    fisher = fisher_diagonal(learner, data, "empirical")
    assert sum(f.sum() for f in fisher.values()) > 1.5 * sum((g**2).sum() for g in mean)


def test_mode_and_batch_norm_are_untouched(learner) -> None:
    learner.backbone.layer = nn.Sequential(learner.backbone.layer, nn.BatchNorm1d(16))
    before = {n: b.clone() for n, b in learner.named_buffers()}
    learner.train()
    fisher_diagonal(learner, TinyStream()[0].train, "empirical")
    assert learner.training
    assert all(torch.equal(before[n], b) for n, b in learner.named_buffers())


def test_a_number_of_samples(learner) -> None:
    learner.generator.manual_seed(0)
    a = fisher_diagonal(learner, TinyStream()[0].train, "empirical", samples=5)
    b = fisher_diagonal(learner, TinyStream()[0].train, "empirical")
    assert not torch.equal(a["head.linear.bias"], b["head.linear.bias"])
