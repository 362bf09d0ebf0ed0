"""Prompts against encoders and attention written out, one row at a time, and against Hugging Face's and PEFT's own ways."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from encoders import IMAGES, TEXTS, config, image_encoder, images, text_encoder, texts
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyBackbone, TinyStream, make_learner

from clplatform.module import prompt
from clplatform.types import ClplatformError, Output

LENGTHS = (4, 12, 1, 7, 5)
# How architectures name what is written out here: layers, and projections of attention in them.
PARTS = {
    "bert": ("encoder.layer", "attention.self", ("query", "key", "value")),
    "distilbert": ("transformer.layer", "attention", ("q_lin", "k_lin", "v_lin")),
    "vit": ("layers", "attention", ("q_proj", "k_proj", "v_proj")),
    "deit": ("layers", "attention", ("q_proj", "k_proj", "v_proj")),
}
KINDS = list(PARTS)


def encoder(kind: str, **changes: Any) -> tuple[Any, Any]:
    """A backbone of three layers with features [B, 16], and five samples for it."""
    if kind in ("bert", "distilbert"):
        return text_encoder(kind, **changes), texts(LENGTHS)
    backbone = image_encoder(kind, **changes)
    for p in backbone.model.embeddings.parameters():  # tokens that differ
        nn.init.normal_(p, std=0.5)
    return backbone, {"pixel_values": images(5)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poolings(kind: str) -> list[str]:
    return {"bert": ["cls", "mean", "pooler"], "distilbert": ["cls", "mean"]}.get(kind, ["cls", "mean"])


CASES = [(kind, pooling) for kind in KINDS for pooling in poolings(kind)]


# -- soft prompts -----------------------------------------------------------------------------------------------------


def read_by_hand(backbone: Any, kind: str, row: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """One sample without padding: its outputs [T, D] and those of its prompts [L, D]."""
    model, n = backbone.model, len(prompts)
    if "input_ids" in row:
        ids = row["input_ids"][:, : int(row["attention_mask"].sum())]
        embedded = model.embeddings(input_ids=ids)
    else:
        embedded = model.embeddings(backbone.pixels(row["pixel_values"]))
    hidden = torch.cat([embedded[0, :1], prompts, embedded[0, 1:]])[None]
    for layer in model.get_submodule(PARTS[kind][0]):
        hidden = layer(hidden, None)
    if kind in ("vit", "deit"):
        hidden = model.layernorm(hidden)
    keep = [0, *range(1 + n, hidden.shape[1])]
    return hidden[0, keep], hidden[0, 1 : 1 + n]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "pooling"), CASES)
def test_every_row_reads_its_own_tokens(kind: str, pooling: str) -> None:
    backbone, batch = encoder(kind, pooling=pooling)
    prompts = drawn(5, 3, 16)
    with prompt.soft_prompts(backbone, prompts) as outputs:
        features = backbone(batch)
    assert len(outputs) == 1
    for i in range(5):
        row = {n: t[i : i + 1] for n, t in batch.items()}
        tokens, what_prompts_became = read_by_hand(backbone, kind, row, prompts[i])
        if pooling == "mean":
            expected = (tokens if "input_ids" in row else tokens[-backbone.n_tokens :]).mean(0)
        else:
            expected = tokens[0] if pooling == "cls" else backbone.model.pooler(tokens[None])[0]
        torch.testing.assert_close(features[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[0][i], what_prompts_became, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features, backbone(batch), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_hugging_face_s_own_inputs_embeds(attention: str) -> None:
    """Where embeddings are words and nothing else, both ways in are the same, padding included."""
    backbone, batch = encoder("bert", pooling="mean", attention=attention)
    embeddings = backbone.model.embeddings
    nn.init.zeros_(embeddings.position_embeddings.weight)
    nn.init.zeros_(embeddings.token_type_embeddings.weight)
    embeddings.LayerNorm = nn.Identity()
    prompts, mask = drawn(5, 2, 16), batch["attention_mask"]
    words = embeddings.word_embeddings(batch["input_ids"])
    hidden = backbone.model(
        inputs_embeds=torch.cat([prompts, words], 1), attention_mask=F.pad(mask, (2, 0), value=1)
    ).last_hidden_state[:, 2:]
    expected = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    with prompt.soft_prompts(backbone, prompts):
        torch.testing.assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_for_all_rows_is_the_same_prompt_for_each(kind: str) -> None:
    backbone, batch = encoder(kind)
    prompts, keys, values = drawn(3, 16), drawn(3, 16, seed=1), drawn(3, 16, seed=2)
    found = []
    for rows in (lambda t: t, lambda t: t.expand(5, -1, -1)):
        with prompt.soft_prompts(backbone, rows(prompts)), prompt.prefixes(backbone, {2: (rows(keys), rows(values))}):
            found.append(backbone(batch))
    assert torch.equal(*found)


# -- prefixes ---------------------------------------------------------------------------------------------------------


def attend_by_hand(module: Any, names: tuple[str, ...], hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one sample [T, D] without padding, head by head."""
    q, k, v = (getattr(module, name)(hidden) for name in names)
    k, v = torch.cat([keys, k]), torch.cat([values, v])
    heads = []
    for columns in torch.arange(16).split(8):
        weights = (q[:, columns] @ k[:, columns].T / 8**0.5).softmax(1)
        heads.append(weights @ v[:, columns])
    return torch.cat(heads, 1)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_attends_to_its_own_prefix(kind: str, layer: int) -> None:
    backbone, batch = encoder(kind)
    blocks, inside, names = PARTS[kind]
    module = backbone.model.get_submodule(blocks)[layer - 1].get_submodule(inside)
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda m, args, output: seen.extend([args[0], output[0]]))  # or as keyword
    first = module.register_forward_pre_hook(
        lambda m, args, kwargs: ((kwargs.pop("hidden_states"), *args), kwargs) if not args else None, with_kwargs=True
    )
    keys, values = drawn(5, 4, 16), drawn(5, 4, 16, seed=1)
    with prompt.prefixes(backbone, {layer: (keys, values)}):
        prefixed = backbone(batch)
    hook.remove()
    first.remove()
    hidden, found = seen
    lengths = LENGTHS if "input_ids" in batch else [hidden.shape[1]] * 5
    for i, n in enumerate(lengths):
        expected = attend_by_hand(module, names, hidden[i, :n], keys[i], values[i])
        if hasattr(module, "o_proj") or hasattr(module, "out_lin"):
            expected = (module.o_proj if hasattr(module, "o_proj") else module.out_lin)(expected)
        torch.testing.assert_close(found[i, :n], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prefixed, backbone(batch), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind: str) -> None:
    """Prefixes in all layers: one row at a time, without padding."""
    backbone, batch = encoder(kind)
    by_layer = {n: (drawn(5, 2, 16, seed=n), drawn(5, 2, 16, seed=10 + n)) for n in (1, 2, 3)}
    with prompt.prefixes(backbone, by_layer):
        together = backbone(batch)
    for i in range(5):
        n = LENGTHS[i] if "input_ids" in batch else None
        row = {name: t[i : i + 1, :n] if name != "pixel_values" else t[i : i + 1] for name, t in batch.items()}
        with prompt.prefixes(backbone, {n: (k[i : i + 1], v[i : i + 1]) for n, (k, v) in by_layer.items()}):
            torch.testing.assert_close(together[i : i + 1], backbone(row), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of what PEFT calls in Transformers
def test_equals_peft_s_prefix_tuning() -> None:
    """PEFT hands prefixes over as past keys and values, in all layers, the same for all rows."""
    backbone, batch = encoder("bert", pooling="mean")
    settings = PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, num_layers=3, num_attention_heads=2, token_dim=16
    )
    reference = get_peft_model(copy.deepcopy(backbone.model), settings).eval()
    table = drawn(3, 3 * 2 * 16)  # for each virtual token, of each layer, its key and its value
    reference.prompt_encoder["default"].embedding.weight.copy_(table)  # type: ignore[union-attr,operator]
    mask = batch["attention_mask"]
    positions = torch.arange(mask.shape[1])[None].expand(5, -1)
    past = reference.get_prompt(5)
    hidden = reference.base_model(  # type: ignore[operator]
        input_ids=batch["input_ids"], attention_mask=F.pad(mask, (3, 0), value=1), past_key_values=past,
        position_ids=positions,
    ).last_hidden_state  # fmt: skip
    expected = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    parts = table.view(3, 3, 2, 16)
    with prompt.prefixes(backbone, {n + 1: (parts[:, n, 0], parts[:, n, 1]) for n in range(3)}):
        torch.testing.assert_close(backbone(batch), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_gives_the_same(kind: str) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        backbone, batch = encoder(kind, attention=attention)
        state = found[0][1].state_dict() if found else backbone.state_dict()
        backbone.load_state_dict(state)
        prefix = {1: (drawn(5, 2, 16), drawn(5, 2, 16, seed=1))}
        with prompt.prefixes(backbone, prefix), prompt.soft_prompts(backbone, drawn(5, 2, 16, seed=2)):
            found.append((backbone(batch), backbone))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prefixes_of_the_same_layer_add_up() -> None:
    backbone, batch = encoder("bert")
    k, v = drawn(5, 5, 16), drawn(5, 5, 16, seed=1)
    with prompt.prefixes(backbone, {2: (k, v)}):
        together = backbone(batch)
    with prompt.prefixes(backbone, {2: (k[:, :2], v[:, :2])}):
        with prompt.prefixes(backbone, {2: (k[:, 2:], v[:, 2:])}):
            torch.testing.assert_close(backbone(batch), together, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(backbone(batch), together, atol=1e-3)


# -- both ---------------------------------------------------------------------------------------------------------------


def both(backbone: nn.Module, seed: int = 0) -> tuple[Any, Any]:
    prefix = {1: (drawn(5, 2, 16, seed=seed), drawn(5, 2, 16, seed=seed + 1))}
    return prompt.soft_prompts(backbone, drawn(5, 2, 16, seed=seed + 2)), prompt.prefixes(backbone, prefix)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind_even_at_an_error(kind: str) -> None:
    backbone, batch = encoder(kind)
    before, state = backbone(batch), {n: t.clone() for n, t in backbone.state_dict().items()}

    def n_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())

    hooks, settings = n_hooks(), backbone.config.to_dict()
    for fails in (False, True):
        soft, prefix = both(backbone)
        expected = pytest.raises(RuntimeError, match="boom") if fails else contextlib.nullcontext()
        with expected, soft, prefix:
            assert not torch.equal(backbone(batch), before)
            inside = copy.deepcopy(backbone)
            if fails:
                raise RuntimeError("boom")
        assert torch.equal(backbone(batch), before)
        assert n_hooks() == hooks
        assert backbone.config.to_dict() == settings
        assert backbone.model.config._attn_implementation == "sdpa"
        assert not prompt._prefixes
    assert state.keys() == backbone.state_dict().keys() == inside.state_dict().keys()
    assert all(torch.equal(t, backbone.state_dict()[n]) for n, t in state.items())


@torch.no_grad()
def test_a_copy_has_prompts_of_its_own() -> None:
    backbone, batch = encoder("vit")
    copied, bare = copy.deepcopy(backbone), backbone(batch)
    soft, prefix = both(backbone)
    with soft, prefix:
        assert torch.equal(copied(batch), bare)
        other_soft, other_prefix = both(copied, seed=5)
        with other_soft, other_prefix:
            mine, its = backbone(batch), copied(batch)
    again_soft, again_prefix = both(copied)
    with again_soft, again_prefix:
        assert torch.equal(copied(batch), mine)
    assert not torch.equal(mine, its)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_prompts_of_the_row_and_not_the_backbone(kind: str) -> None:
    backbone, batch = encoder(kind)
    backbone.requires_grad_(False)
    tokens, keys, values = (drawn(5, 2, 16, seed=s).requires_grad_() for s in range(3))
    with prompt.soft_prompts(backbone, tokens), prompt.prefixes(backbone, {2: (keys, values)}):
        backbone(batch)[1].square().sum().backward()
    for p in (tokens, keys, values):
        assert p.grad is not None
        assert p.grad[1].any(1).all()
        assert not p.grad[[0, 2, 3, 4]].any()
    assert all(p.grad is None for p in backbone.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_reduced_precision(kind: str) -> None:
    backbone, batch = encoder(kind)
    soft, prefix = both(backbone)
    with soft, prefix:
        expected = backbone(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = backbone(batch)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


# -- what fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "deit", "beit", "dinov2_with_registers", "bert", "roberta", "distilbert"])
def test_these_take_both(kind: str) -> None:
    image = kind in ("vit", "deit", "beit", "dinov2_with_registers")
    backbone, spec = (image_encoder(kind), IMAGES) if image else (text_encoder(kind), TEXTS)
    backbone.train()
    state = torch.get_rng_state()
    prompt.check_soft_prompts("x", backbone, spec)
    prompt.check_prefixes("x", backbone, spec, [1, 3], "layers")
    assert backbone.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in backbone.parameters())


def refusals() -> list[Any]:
    biased = config("beit", use_relative_position_bias=True)
    return [
        pytest.param(lambda: (text_encoder("gpt2"), TEXTS), "causal; choose an encoder", True, True, id="causal"),
        pytest.param(lambda: (image_encoder("swin", pooling="mean"), IMAGES), "SwinModel", True, True, id="windows"),
        pytest.param(lambda: (text_encoder("electra"), TEXTS), "ElectraModel", True, False, id="projected embeddings"),
        pytest.param(lambda: (text_encoder("modernbert"), TEXTS), "ModernBert", True, False, id="rotary positions"),
        pytest.param(lambda: (image_encoder(config=biased), IMAGES), "BeitModel", True, False, id="relative positions"),
        pytest.param(lambda: (TinyBackbone(), IMAGES), "no Hugging Face Transformer", True, False, id="a layer"),
    ]


@pytest.mark.parametrize(("make", "message", "soft", "prefix"), refusals())
def test_what_does_not_fit_is_refused(make: Any, message: str, soft: bool, prefix: bool) -> None:
    backbone, spec = make()
    if soft:
        with pytest.raises(ClplatformError, match=f"strategy=x cannot give soft prompts to this backbone: .*{message}"):
            prompt.check_soft_prompts("x", backbone, spec)
    if prefix:
        with pytest.raises(ClplatformError, match=f"strategy=x cannot give prefixes to this backbone: .*{message}"):
            prompt.check_prefixes("x", backbone, spec, [1], "layers")


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ClplatformError, match=r"strategy.x.layers=\[3, 4\]: the backbone has 3 layers.*from 1 to 3"):
        prompt.check_prefixes("x", text_encoder(), TEXTS, [3, 4], "layers")


def test_prompts_that_reach_nothing_are_refused() -> None:
    """Where a pass goes through without an error."""
    backbone = image_encoder()

    class Deaf(nn.Module):
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

    for i in range(3):
        backbone.model.layers[i] = Deaf()
    for check in (
        lambda: prompt.check_soft_prompts("x", backbone, IMAGES),
        lambda: prompt.check_prefixes("x", backbone, IMAGES, [1], "layers"),
    ):
        with pytest.raises(ClplatformError, match="do not reach its features"):
            check()


# -- what prompt strategies share -------------------------------------------------------------------------------------


def bare_features(learner: Any, x: Tensor) -> Tensor:
    return (x.flatten(1) @ learner.backbone.layer.weight.T + learner.backbone.layer.bias).tanh()


@torch.no_grad()
@pytest.mark.parametrize("augmented", [False, True])
def test_queries_are_those_of_what_the_model_sees(augmented: bool) -> None:
    """In eval mode; computed once unless samples are augmented, and then of the augmented ones."""
    stream, passes = TinyStream(), []
    options = {"augment": lambda batch, g: {**batch, "pixel_values": 2 * batch["pixel_values"]}} if augmented else {}
    learner = make_learner(stream, {}, dropout=0.5, **options)
    learner.backbone.register_forward_hook(lambda m, args, output: passes.append(len(output)))
    queries = prompt.Queries()
    queries.prepare(learner, stream[0].train)
    learner.train()
    for rows in torch.arange(32).split(8):
        batch = learner.augment(stream[0].train.fetch(rows))
        torch.testing.assert_close(queries(learner, batch), bare_features(learner, batch["pixel_values"]))
        assert learner.backbone.training and learner.backbone.dropout.training
    assert sum(passes) == 32
    assert len(passes) == (4 if augmented else 1)
    test = stream[0].test.fetch(torch.arange(16))
    learner.eval()
    torch.testing.assert_close(queries(learner, test), bare_features(learner, test["pixel_values"]))
    assert not learner.backbone.training
    queries.clear()
    assert queries.features.features.numel() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_masked_loss_knows_no_other_classes(smoothing: float) -> None:
    learner = make_learner(TinyStream(), {}, label_smoothing=smoothing)
    learner.experience = TinyStream()[1]  # classes 2 and 3
    logits, labels = drawn(6, 4).requires_grad_(), torch.tensor([2, 3, 3, 2, 2, 3])
    output = Output(logits, drawn(6, 16))
    loss = prompt.task_loss(learner, {"labels": labels}, output, mask=True)
    log_p = torch.stack([z - (z[2].exp() + z[3].exp()).log() for z in logits])
    expected = -sum(
        (1 - smoothing) * p[y] + smoothing * (p[2] + p[3]) / 2 for p, y in zip(log_p, labels, strict=True)
    ) / 6  # fmt: skip
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, :2].any()
    plain = prompt.task_loss(learner, {"labels": labels}, output, mask=False)
    torch.testing.assert_close(plain, learner.task_loss({"labels": labels}, output))


def test_decay_and_rate() -> None:
    groups = [{"params": [1]}, {"params": [2], "weight_decay": 0.3}]
    assert prompt.without_decay(groups, 0.1) == [
        {"params": [1], "weight_decay": 0.0, "lr": 0.1}, {"params": [2], "weight_decay": 0.0, "lr": 0.1}
    ]  # fmt: skip
    assert prompt.without_decay(groups, None) == [
        {"params": [1], "weight_decay": 0.0},
        {"params": [2], "weight_decay": 0.0},
    ]


def test_cosines() -> None:
    q, k = drawn(3, 5), drawn(4, 5, seed=1)
    expected = torch.stack([F.cosine_similarity(q, key[None], dim=1) for key in k], 1)
    torch.testing.assert_close(prompt.cosine(q, k), expected)
