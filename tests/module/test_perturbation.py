"""Perturbed token vectors: against the doors that models have for vectors, and what stays as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from adversarial import Bag
from encoders import IMAGES, TEXTS, image_encoder, images, text_encoder, texts
from strategies import from_page
from text_world import TinyTextStream
from torch import nn
from world import TinyBackbone, make_learner

from clplatform.build import make
from clplatform.config import EXTRA, conf_dir
from clplatform.module.perturbation import (
    COLUMN,
    add_perturbation,
    norms,
    perturbed,
    project,
    shape_of_vectors,
    token_embedding,
)

TEXT_MODELS = ["bert", "roberta", "electra", "modernbert", "distilbert", "gpt2"]
IMAGE_MODELS = ["vit", "deit", "beit", "dinov2_with_registers", "siglip_vision_model", "swin"]


def ours(kind: str) -> Any:
    """A backbone of ours as its page has it."""
    page = yaml.safe_load((conf_dir() / "backbone" / f"{kind}.yaml").read_text())
    node = {key: value for key, value in page.items() if key not in EXTRA["backbone"]}
    return make(node, input=TEXTS if kind == "transformer_text" else IMAGES).eval()


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_a_perturbation_is_what_is_added_to_the_vectors_that_a_model_reads(kind: str) -> None:
    backbone, batch = text_encoder(kind), texts()
    embedding = token_embedding(backbone)
    assert isinstance(embedding, nn.Embedding)
    r = torch.randn(*batch["input_ids"].shape, embedding.embedding_dim)
    with add_perturbation(backbone):
        found = backbone({**batch, COLUMN: r})
        plain = backbone(batch)  # a batch without a perturbation in between
    mask = batch["attention_mask"]
    positions: dict[str, Any] = {}
    if kind == "roberta":  # which numbers its positions by the ids, if it has them
        positions["position_ids"] = mask.cumsum(1) * mask + 1
    output = backbone.model(inputs_embeds=embedding(batch["input_ids"]) + r, attention_mask=mask, **positions)
    weight = mask[:, :, None].float()
    expected = (output.last_hidden_state * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, backbone(batch))
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("kind", [*IMAGE_MODELS, "transformer_vit"])
def test_patches_are_reached(kind: str) -> None:
    pooling = {} if kind in ("vit", "deit", "beit", "dinov2_with_registers") else {"pooling": "mean"}
    shape = (3, 32, 32) if kind == "swin" else (3, 8, 8)  # whose windows want more than a patch
    settings = {**pooling, "input": replace(IMAGES, shape=shape)}
    backbone: Any = ours(kind) if kind == "transformer_vit" else image_encoder(kind, **settings)
    batch = {"pixel_values": images(shape=shape)}
    r = torch.zeros(5, *shape_of_vectors(backbone, batch), requires_grad=True)
    with add_perturbation(backbone):
        features = backbone({**batch, COLUMN: r})
    torch.testing.assert_close(features, backbone(batch))
    (g,) = torch.autograd.grad(features.square().sum(), r)
    assert (norms(g) > 0).all()


def test_our_transformer_reads_perturbed_vectors() -> None:
    backbone, batch = ours("transformer_text"), texts()
    embedding = token_embedding(backbone)
    assert embedding is backbone.encoder.embeddings.token
    r = torch.randn(*batch["input_ids"].shape, embedding.embedding_dim)
    with add_perturbation(backbone):
        found = backbone({**batch, COLUMN: r})
    row = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
    with torch.no_grad():  # every token of the batch with a vector of its own
        table = nn.Embedding.from_pretrained((embedding(batch["input_ids"]) + r).flatten(0, 1))
        backbone.encoder.embeddings.token = table
    torch.testing.assert_close(found, backbone({**batch, "input_ids": row}))


def test_no_token_vectors_no_embedding() -> None:
    assert token_embedding(TinyBackbone()) is None


def test_nothing_is_left_behind_and_copies_know_nothing_of_it() -> None:
    backbone, batch = text_encoder("bert"), texts()
    r = torch.ones(*batch["input_ids"].shape, 16)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())

    before, plain, teacher = hooks(), backbone(batch), copy.deepcopy(backbone)
    with add_perturbation(backbone):
        assert hooks() == before + 2
        assert torch.equal(teacher({**batch, COLUMN: r}), plain)
        assert not torch.equal(backbone({**batch, COLUMN: r}), plain)
    with pytest.raises(RuntimeError), add_perturbation(backbone):
        backbone({**batch, COLUMN: torch.ones(2, 3, 4)})
    assert hooks() == before
    assert torch.equal(backbone({**batch, COLUMN: r}), plain)


def test_only_the_first_reading_of_a_pass_is_perturbed() -> None:
    """A decoder may share its embedding with the encoder: what is written is not perturbed."""

    class Twice(Bag):
        def forward(self, batch: Any) -> Any:
            return torch.stack([self.embeddings["token"](batch["input_ids"]) for _ in range(2)])

    backbone, batch = Twice(), TinyTextStream(1)[0].test.fetch(torch.arange(4))
    r = torch.randn(*batch["input_ids"].shape, 16)
    plain = backbone(batch)
    with add_perturbation(backbone):
        for _ in range(2):
            read, written = backbone({**batch, COLUMN: r})
            torch.testing.assert_close(read, plain[0] + r)
            assert torch.equal(written, plain[1])


def passes_of(dropout: float) -> tuple[Any, Any]:
    stream = TinyTextStream(2)
    learner = make_learner(stream, {"finetuning": from_page("finetuning")}, backbone=Bag(dropout))
    learner.build(stream[0].info)
    return learner.train(), stream[0].train.fetch(torch.arange(16))


def test_all_passes_of_a_step_have_the_same_dropout_and_the_next_step_another() -> None:
    learner, batch = passes_of(dropout=0.5)
    torch.manual_seed(1)
    with perturbed(learner, batch) as passes:
        zeros = passes.zeros()
        first, second = passes.loss(zeros), passes.loss(zeros)
        assert torch.equal(first, second)
        passes.direction(zeros)
        assert torch.equal(passes.loss(zeros), first)
    with perturbed(learner, batch) as passes:
        assert not torch.equal(passes.loss(zeros), first)
    assert not torch.equal(learner.task_loss(batch, learner(batch)), first)


def test_a_direction_has_length_one_for_each_text_and_none_at_padding() -> None:
    learner, batch = passes_of(dropout=0.0)
    with perturbed(learner, batch) as passes:
        d = passes.direction(passes.zeros())
    torch.testing.assert_close(norms(d).flatten(), torch.ones(16))
    assert (d[batch["attention_mask"] == 0] == 0).all()
    assert (d[batch["attention_mask"] == 1].abs().sum(1) > 0).all()


def test_padding_is_not_perturbed_even_where_a_model_looks_at_it() -> None:
    """As long as the model's gradient at padding is not zero, it would be."""

    class Looks(Bag):
        def forward(self, batch: Any) -> Any:
            return self.embeddings["token"](batch["input_ids"]).mean(1)

    learner, batch = passes_of(dropout=0.0)
    learner.backbone = Looks()
    with perturbed(learner, batch) as passes:
        d = passes.direction(passes.zeros())
    assert (d[batch["attention_mask"] == 0] == 0).all()
    torch.testing.assert_close(norms(d).flatten(), torch.ones(16))


def test_where_the_loss_is_flat_there_is_no_direction() -> None:
    learner, batch = passes_of(dropout=0.0)
    nn.init.zeros_(learner.head.linear.weight)
    with perturbed(learner, batch) as passes:
        assert passes.direction(passes.zeros()).eq(0).all()


@pytest.mark.parametrize("radius", [0.0, 0.5, 100.0])
def test_the_projection_is_the_nearest_point_of_the_ball(radius: float) -> None:
    x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    y = project(x, radius)
    for before, after in zip(x, y, strict=True):
        if before.norm() <= radius:
            torch.testing.assert_close(after, before)
        else:
            torch.testing.assert_close(after, before * radius / before.norm())
    assert y.isfinite().all()
