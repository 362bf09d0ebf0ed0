"""Copies of Hugging Face's models give the same numbers, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copied import bart, bert, gpt2, padded
from torch import Tensor

from clplatform.backbone.transformer.convert import from_bart, from_bert, from_gpt2
from clplatform.types import ClplatformError

LENGTHS = [9, 4, 1]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def same(found: Tensor, expected: Tensor, mask: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Where the mask is 1, and the gradients of a sum with respect to two matrices [V, D] of token embeddings."""
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], **CLOSE)
    weights = torch.randn(found[real].shape, generator=torch.Generator().manual_seed(1)) / 10
    (mine,) = torch.autograd.grad((found[real] * weights).sum(), ours)
    (his,) = torch.autograd.grad((expected[real] * weights).sum(), theirs)
    assert mine.abs().max() > 0.01
    torch.testing.assert_close(mine[4:], his[4:], rtol=1e-4, atol=1e-4)  # the library gives padding's row none


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "relu", "layer_norm_eps": 1e-3}, {"hidden_act": "gelu_new"}])
def test_bert(changes: dict[str, Any], seed: int) -> None:
    model = bert(seed, **changes)
    encoder = from_bert(model)
    tokens, mask = padded(LENGTHS, seed=seed)
    segments = (torch.arange(9) > 2).long().expand(3, -1)
    for given in (None, segments):
        expected = model(tokens, attention_mask=mask, token_type_ids=given).last_hidden_state
        same(
            encoder(tokens, mask, given), expected, mask, encoder.embeddings.token.weight,
            model.embeddings.word_embeddings.weight,
        )  # fmt: skip
    torch.testing.assert_close(encoder(tokens), model(tokens, attention_mask=mask * 0 + 1).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "changes", [{}, {"activation_function": "gelu", "n_inner": 20}, {"tie_word_embeddings": False, "n_head": 4}]
)
def test_gpt2(changes: dict[str, Any], seed: int) -> None:
    model = gpt2(seed, **changes)
    lm = from_gpt2(model)
    tokens, mask = padded(LENGTHS, seed=seed)
    same(
        lm(tokens, mask), model(tokens, attention_mask=mask).logits, mask, lm.decoder.embeddings.token.weight,
        model.transformer.wte.weight,
    )  # fmt: skip
    hidden = model.transformer(tokens, attention_mask=torch.ones_like(mask)).last_hidden_state
    torch.testing.assert_close(lm.decoder(tokens), hidden, **CLOSE)
    assert (lm.head.weight is lm.decoder.embeddings.token.weight) == (not changes.get("n_head"))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"scale_embedding": True, "activation_function": "relu"}])
def test_bart(changes: dict[str, Any], seed: int) -> None:
    model = bart(seed, **changes)
    ours = from_bart(model)
    (source, mask), (target, target_mask) = padded(LENGTHS, seed=seed), padded([3, 6, 5], seed=seed + 7)
    found = ours(source, target, mask, target_mask)
    expected = model(source, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=target_mask).logits
    same(found, expected, target_mask, ours.encoder.embeddings.token.weight, model.model.shared.weight)
    memory = model.model.encoder(source, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours.encoder(source, mask)[mask.bool()], memory[mask.bool()], **CLOSE)


def test_one_matrix_of_embeddings_serves_encoder_decoder_and_head() -> None:
    ours = from_bart(bart())
    assert ours.encoder.embeddings.token.weight is ours.decoder.embeddings.token.weight is ours.head.weight
    shared = [name for name in ours.state_dict() if name.endswith(("token.weight", "head.weight"))]
    assert len(shared) == 3
    assert len({ours.state_dict()[name].data_ptr() for name in shared}) == 1


@torch.no_grad()
@pytest.mark.parametrize(("make", "convert"), [(bert, from_bert), (gpt2, from_gpt2), (bart, from_bart)])
def test_it_is_a_copy_with_the_same_dropout_type_and_mode(make: Any, convert: Any) -> None:
    names = {bert: ["hidden_dropout_prob", "attention_probs_dropout_prob"], gpt2: ["resid_pdrop", "attn_pdrop"],
             bart: ["dropout", "attention_dropout"]}[make]  # fmt: skip
    model = make(**dict(zip(names, (0.3, 0.2), strict=True))).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours = convert(model)
    assert ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    rates = {round(m.dropout, 3) for n, m in ours.named_modules() if n.endswith("attention")}
    assert rates == {0.2}
    assert {m.dropout.p for n, m in ours.named_modules() if n.endswith("_residual")} == {0.3}
    for parameter in ours.parameters():
        parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "convert", "changes", "message"),
    [
        (bert, from_bert, {"is_decoder": True}, "BERT with is_decoder=True"),
        (bert, from_bert, {"hidden_act": "silu"}, "activation silu"),
        (gpt2, from_gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (gpt2, from_gpt2, {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (gpt2, from_gpt2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (bart, from_bart, {"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1"),
    ],
)
def test_what_our_parts_do_not_have_is_refused(make: Any, convert: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClplatformError, match=message):
        convert(make(**changes))


@torch.no_grad()
def test_positions_behind_padding_on_the_left() -> None:
    """As when generating: a text gives the same whatever stands before it."""
    model = gpt2()
    lm, (tokens, mask) = from_gpt2(model), padded(LENGTHS, left=True)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    found = lm.head(lm.decoder(tokens, mask_BS=mask, positions_BT=place))
    expected = model(tokens, attention_mask=mask, position_ids=place).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    torch.testing.assert_close(found[1, 5:], lm(tokens[1:2, 5:])[0], **CLOSE)
