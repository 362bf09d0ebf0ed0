"""P-tuning's tokens against its networks written out, and what they do against prompts that last as long as a context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import TEXTS, text_encoder
from strategies import from_page as strategy
from torch import Tensor
from torch.nn import functional as F
from tuned import encoder, from_page, shake, tiny_experiment, trained_names

from clplatform.module.prompt import soft_prompts
from clplatform.types import ClplatformError

ENCODERS = ["mlp", "lstm"]


def layers(head: Any, x: Tensor) -> Tensor:
    """Linear layers with ReLU between them."""
    linear = [m for m in head if hasattr(m, "weight")]
    for m in linear[:-1]:
        x = F.relu(x @ m.weight.T + m.bias)
    return x @ linear[-1].weight.T + linear[-1].bias


def one_way(lstm: Any, x: Tensor, suffix: str) -> Tensor:
    """An LSTM of one layer in one direction, written out: [L, D] → [L, H]."""
    w, u, b, c = (getattr(lstm, f"{n}_{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = cell = torch.zeros(u.shape[1])
    found = []
    for row in x:
        i, f, g, o = (row @ w.T + b + hidden @ u.T + c).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        found.append(hidden)
    return torch.stack(found)


def both_ways(lstm: Any, x: Tensor) -> Tensor:
    for layer in range(2):
        backward = one_way(lstm, x.flip(0), f"l{layer}_reverse").flip(0)
        x = torch.cat([one_way(lstm, x, f"l{layer}"), backward], 1)
    return x


@torch.no_grad()
@pytest.mark.parametrize("network", ENCODERS)
@pytest.mark.parametrize("kind", ["vit", "bert", "distilbert"])
def test_is_the_bare_model_with_the_prompts_that_the_network_makes(kind: str, network: str) -> None:
    backbone, batch = encoder(kind, "p_tuning", encoder=network)
    shake(backbone)
    made = backbone.model.embeddings.soft_prompt.encoder
    x = made.embedding.weight
    assert x.shape == (3, 16)
    tokens = layers(made.mlp_head, both_ways(made.lstm_head, x) if network == "lstm" else x)
    bare, _ = encoder(kind)
    with soft_prompts(bare, tokens):
        expected = bare(batch)
    torch.testing.assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(backbone(batch), bare(batch), atol=1e-3)
    assert all(n.startswith("model.embeddings.soft_prompt.encoder.") for n in trained_names(backbone))
    assert len(trained_names(backbone)) == (1 + 16 + 4 if network == "lstm" else 1 + 6)


@pytest.mark.parametrize(("hidden", "n"), [(8, 3 * 16 + 16 * 8 + 8 + 8 * 8 + 8 + 8 * 16 + 16),
                                           (None, 3 * 16 + 3 * (16 * 16 + 16))])  # fmt: skip
def test_the_network_is_as_wide_as_it_is_told(hidden: int | None, n: int) -> None:
    backbone, _ = encoder("bert", "p_tuning", hidden=hidden)
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == n


def test_an_lstm_learns_under_ewc_and_replay(tmp_path: Any) -> None:
    experiment = tiny_experiment(tmp_path, "bert", "p_tuning", {n: strategy(n) for n in ("replay", "ewc")})
    torch.manual_seed(5)
    backbone = experiment.learner.backbone
    backbone.model.embeddings.soft_prompt = from_page("p_tuning", encoder="lstm").tokens(backbone.feature_size)
    before = {n: p.detach().clone() for n, p in backbone.named_parameters() if p.requires_grad}
    experiment.run()
    assert all(not torch.equal(p, before[n]) for n, p in backbone.named_parameters() if n in before)
    assert any("lstm_head" in n for n in experiment.learner.chain.strategies["ewc"].quadratic.weight)


def test_refuses_what_does_not_take_them() -> None:
    with pytest.raises(
        ClplatformError, match="tuning=p_tuning cannot give soft prompts to this backbone: its attention"
    ):
        from_page("p_tuning").apply(text_encoder("gpt2"), TEXTS)
