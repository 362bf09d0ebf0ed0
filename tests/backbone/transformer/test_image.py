"""The Vision Transformer as a backbone: against Hugging Face's, its settings, and runs with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, only_run
from composed import trained
from encoders import IMAGES, TEXTS, images
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTModel

import clplatform
from clplatform.backbone.transformer.image import PatchEmbeddings, TransformerImage
from clplatform.cli import main
from clplatform.config import check_arguments
from clplatform.module.hidden import capture
from clplatform.types import ClplatformError, InputSpec

SIZES = ["backbone.size=16", "backbone.n_layers=2", "backbone.n_heads=2", "backbone.inner_size=16"]
PAGE = ["backbone=transformer_vit", *SIZES, "stream.n_experiences=2"]
SETTINGS: dict[str, Any] = {
    "name": "small", "size": 16, "n_layers": 3, "n_heads": 2, "inner_size": 24, "activation": "gelu", "norm": "pre",
    "patch_size": None, "pooling": "cls", "dropout": 0.0, "freeze": "none",
}  # fmt: skip


def backbone(*, input: InputSpec = IMAGES, seed: int = 0, **changes: Any) -> TransformerImage:
    torch.manual_seed(seed)
    return TransformerImage(input=input, **SETTINGS | changes).eval()


def copy_vit(ours: TransformerImage) -> Any:
    """Hugging Face's ViT of the same sizes, whose random weights ours gets."""
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=2,
        num_channels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs = model.state_dict()

    def find(*parts: str) -> dict[str, Tensor]:
        """Weight and bias of the one module whose name has all these parts."""
        (name,) = {n.rpartition(".")[0] for n in theirs if all(p in f"{n}." for p in parts)}
        return {kind: theirs[f"{name}.{kind}"] for kind in ("weight", "bias")}

    patches = find("patch_embeddings")
    ours.embeddings.projection.load_state_dict({**patches, "weight": patches["weight"].flatten(1)})
    with torch.no_grad():
        ours.embeddings.class_token.copy_(theirs["embeddings.cls_token"][0, 0])
        ours.embeddings.position.weight.copy_(theirs["embeddings.position_embeddings"][0])
    for i, layer in enumerate(ours.stack.layers):
        for p in ("q", "k", "v"):
            getattr(layer.attention, f"{p}_proj").load_state_dict(find(f"s.{i}.", f"{p}_proj."))
        layer.attention.out_proj.load_state_dict(find(f"s.{i}.", "o_proj."))
        layer.attention_residual.norm.load_state_dict(find(f"s.{i}.", "layernorm_before."))
        layer.feed_forward_residual.norm.load_state_dict(find(f"s.{i}.", "layernorm_after."))
        layer.feed_forward.expand.load_state_dict(find(f"s.{i}.", "fc1."))
        layer.feed_forward.contract.load_state_dict(find(f"s.{i}.", "fc2."))
    ours.stack.norm.load_state_dict({k: theirs[f"layernorm.{k}"] for k in ("weight", "bias")})
    return model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_it_is_hugging_face_s_vit(pooling: str) -> None:
    ours = backbone(pooling=pooling)
    model, x = copy_vit(ours), images()
    with torch.no_grad():
        hidden = model(ours.pixels(x)).last_hidden_state
        expected = hidden[:, 0] if pooling == "cls" else hidden[:, 1:].mean(1)
        torch.testing.assert_close(ours({"pixel_values": x}), expected, rtol=1e-5, atol=1e-5)


def test_a_patch_is_a_square_of_pixels() -> None:
    """Row by row, channels first: each pixel of an image comes to its place."""
    module = PatchEmbeddings(channels=2, side=6, patch=3, size=18, dropout=0.0)
    with torch.no_grad():
        module.projection.weight.copy_(torch.eye(18))
        for p in (module.projection.bias, module.class_token, module.position.weight):
            p.zero_()
    x = torch.randn(2, 2, 6, 6)
    found = module(x)
    assert found.shape == (2, 5, 18)
    assert (found[:, 0] == 0).all()
    for row in range(2):
        for column in range(2):
            square = x[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            assert torch.equal(found[:, 1 + 2 * row + column], square.flatten(1))


@pytest.mark.parametrize(
    ("shape", "patch_size", "n_tokens"),
    [((1, 8, 8), None, 16), ((3, 32, 32), None, 64), ((1, 28, 28), None, 49), ((3, 31, 30), None, 64),
     ((3, 8, 8), 4, 4), ((3, 8, 8), 3, 9), ((3, 4, 9), 3, 9)],
)  # fmt: skip
def test_it_fits_the_stream_s_images(shape: tuple[int, int, int], patch_size: int | None, n_tokens: int) -> None:
    spec = InputSpec("image", shape=shape, mean=(0.5,) * shape[0], std=(0.2,) * shape[0])
    encoder = backbone(input=spec, patch_size=patch_size)
    assert encoder.n_tokens == n_tokens
    features = encoder({"pixel_values": images(2, shape)})
    assert features.shape == (2, encoder.feature_size) and features.isfinite().all()
    assert not torch.equal(features[0], features[1])


@torch.no_grad()
def test_blocks_are_the_embeddings_and_the_layers() -> None:
    encoder = backbone()
    with capture(encoder.blocks()) as states:
        features = encoder({"pixel_values": images(2)})
    assert len(states) == len(encoder.blocks()) == 4
    torch.testing.assert_close(encoder.stack.norm(states[-1])[:, 0], features)
    frozen = backbone(freeze=0)
    assert {n.split(".")[0] for n, p in frozen.named_parameters() if not p.requires_grad} == {"embeddings"}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ClplatformError, match="backbone=small reads images, but the stream is made of texts"):
        backbone(input=TEXTS)
    with pytest.raises(ClplatformError, match="n_heads=5 does not divide size=16"):
        backbone(n_heads=5)


@pytest.mark.parametrize(("key", "value"), [("patch_size", 0), ("size", 0), ("norm", "none"), ("pooling", "max")])
def test_settings_out_of_range_are_refused(key: str, value: Any) -> None:
    given = {"input", "load_weights", "assets"}
    check_arguments("backbone", TransformerImage, SETTINGS, given)
    with pytest.raises(ClplatformError, match=rf"backbone\.{key}"):
        check_arguments("backbone", TransformerImage, {**SETTINGS, key: value}, given)


# -- runs ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["replay", "o_lora", "adapters", "hat", "gpm", "podnet"])
def test_a_saved_model_answers_as_the_trained_one(strategy: str, tmp_path: Path) -> None:
    tasks = ["stream.scenario=task_incremental"] if strategy == "hat" else []
    run = trained(tmp_path, *PAGE, f"strategy={strategy}", *tasks)
    batch = run.stream[1].test.fetch(torch.arange(20))
    found = clplatform.load(tmp_path).logits(batch["pixel_values"].numpy(), task=1 if tasks else None)
    assert torch.equal(found, run.learner(batch).logits)


def test_it_learns(tmp_path: Path) -> None:
    """Ten digits in one experience, in a few hundred steps."""
    overrides = ["backbone=transformer_vit", "backbone.size=32", "backbone.n_layers=2", "stream.n_experiences=1"]
    run = trained(tmp_path, *overrides, "strategy=finetuning", "trainer.max_epochs=8", "~trainer.limit_train_batches")
    matrix: Any = run.results.matrix
    assert matrix[-1][0] > 0.8


def test_the_command_line_trains_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call(
        capsys, *PAGE, "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "threads=1", "tracking=local",
        "trainer.accelerator=cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    Image.fromarray((load_digits().images[3] * 255 / 16).astype("uint8")).save(tmp_path / "three.png")
    assert main(["predict", str(only_run()), str(tmp_path / "three.png"), "--top", "10"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert '"label": ' in line
