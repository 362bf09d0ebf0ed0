"""BitFit trains the biases, and nothing else."""

from __future__ import annotations

import pytest
from encoders import TEXTS, text_encoder
from torch import nn
from tuned import encoder, from_page, trained_names

from clplatform.types import ClplatformError


@pytest.mark.parametrize("kind", ["vit", "bert", "distilbert"])
def test_exactly_the_biases(kind: str) -> None:
    backbone, _ = encoder(kind, "bitfit")
    biases = {
        id(m.bias) for m in backbone.modules()
        if isinstance(m, nn.Linear | nn.LayerNorm | nn.Conv2d) and m.bias is not None
    }  # fmt: skip
    assert {id(p) for p in backbone.parameters() if p.requires_grad} == biases
    assert len(trained_names(backbone)) > 3 * 8


def test_refuses_a_backbone_without_biases() -> None:
    with pytest.raises(ClplatformError, match="tuning=bitfit: the backbone has no biases; choose another tuning"):
        from_page("bitfit").apply(text_encoder("modernbert"), TEXTS)
