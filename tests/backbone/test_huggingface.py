"""Encoders give what Hugging Face's own models give with the same weights; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from encoders import IMAGE_MODELS, IMAGES, TEXT_MODELS, config, image_encoder, images, text_encoder, texts
from torch import Tensor
from transformers import AutoConfig, AutoModel

from clplatform.backbone.huggingface import fit_images
from clplatform.backbone.pretrained import carries
from clplatform.build import make, without_extra
from clplatform.config import conf_dir
from clplatform.signature import find
from clplatform.types import ClplatformError, InputSpec


def twin(encoder: Any) -> Any:
    """Hugging Face's model of the same configuration, given the encoder's weights; its pooler keeps its own."""
    model = AutoModel.from_config(encoder.config, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(encoder.model.state_dict(), strict=False)
    assert not unexpected
    assert all("pooler" in name for name in missing)
    return model.eval()


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGES.mean, IMAGES.std))
    return (x.float() / 255 - mean) / std


# -- images -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", IMAGE_MODELS)
def test_the_class_token_is_hugging_face_s(model_type: str) -> None:
    encoder, x = image_encoder(model_type), images()
    expected = twin(encoder)(normalised(x)).last_hidden_state[:, 0]
    found = encoder({"pixel_values": x})
    assert found.shape == (5, encoder.feature_size) == (5, 16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*IMAGE_MODELS, "siglip_vision_model", "swin"])
def test_the_mean_is_over_the_patches_only(model_type: str) -> None:
    """Not over the class token, DeiT's distillation token or registers."""
    changes = {"patch_size": 1} if model_type == "swin" else {}
    encoder, x = image_encoder(model_type, config=config(model_type, **changes), pooling="mean"), images()
    hidden = twin(encoder)(normalised(x)).last_hidden_state
    others = {"vit": 1, "deit": 2, "beit": 1, "dinov2_with_registers": 5}.get(model_type, 0)
    assert hidden.shape[1] == others + (4 if model_type == "swin" else encoder.n_tokens)  # Swin merges patches
    expected = torch.stack([hidden[:, i] for i in range(others, hidden.shape[1])]).mean(0)
    torch.testing.assert_close(encoder({"pixel_values": x}), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "given", "image_size", "expected"),
    [
        ((1, 8, 8), {}, None, (8, 2)),
        ((1, 28, 28), {}, None, (28, 4)),
        ((3, 32, 32), {}, None, (32, 4)),
        ((3, 31, 30), {}, None, (32, 4)),
        ((3, 64, 64), {}, 16, (16, 2)),
        ((3, 64, 64), {"image_size": 32}, None, (32, 4)),
        ((3, 64, 64), {"image_size": 32}, 16, (16, 2)),
        ((3, 8, 8), {"patch_size": 4}, None, (8, 4)),
        ((1, 8, 8), {"image_size": [4, 8]}, None, ([4, 8], 2)),
    ],
)
def test_a_new_model_fits_the_stream(
    shape: tuple[int, int, int], given: dict[str, Any], image_size: int | None, expected: tuple[Any, int]
) -> None:
    fitted = fit_images(config("vit", **given), shape, image_size)
    assert (fitted["image_size"], fitted["patch_size"]) == expected
    assert fitted["num_channels"] == shape[0]
    spec = InputSpec("image", shape=shape, mean=(0.5,) * shape[0], std=(0.2,) * shape[0])
    encoder = image_encoder(input=spec, config=config("vit", **given), image_size=image_size)
    height, width = (expected[0],) * 2 if isinstance(expected[0], int) else expected[0]
    assert encoder.n_tokens == (height // expected[1]) * (width // expected[1])
    assert encoder({"pixel_values": images(2, shape)}).shape == (2, 16)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2_with_registers"])
def test_another_image_size_than_the_pretraining_s_interpolates_the_positions(model_type: str, tmp_path: Path) -> None:
    image_encoder(model_type).model.save_pretrained(tmp_path)
    small = image_encoder(model_type, config=None, pretrained=str(tmp_path), pooling="mean")
    large = image_encoder(model_type, config=None, pretrained=str(tmp_path), pooling="mean", image_size=16)
    assert (small.pixels.size, small.n_tokens) == ((8, 8), 16)
    assert (large.pixels.size, large.n_tokens) == ((16, 16), 64)
    x = images()
    doubled = torch.nn.functional.interpolate(x / 255, (16, 16), mode="bilinear", antialias=True)
    options = {} if model_type.startswith("dino") else {"interpolate_pos_encoding": True}  # DINOv2 always does
    hidden = twin(large)((doubled - 0.5) / 0.5, **options).last_hidden_state
    torch.testing.assert_close(large({"pixel_values": x}), hidden[:, -64:].mean(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(large({"pixel_values": x}), small({"pixel_values": x}), atol=1e-3)


def test_a_pretrained_model_of_other_channels_is_refused(tmp_path: Path) -> None:
    grey = InputSpec("image", shape=(1, 8, 8), mean=(0.5,), std=(0.5,))
    image_encoder(input=grey).model.save_pretrained(tmp_path)
    with pytest.raises(ClplatformError, match="reads images of 1 channels, the stream's have 3"):
        image_encoder(config=None, pretrained=str(tmp_path))


# -- text ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_text_features_are_hugging_face_s(model_type: str) -> None:
    batch = texts()
    for pooling in ("cls", "mean"):
        encoder = text_encoder(model_type, pooling=pooling)
        hidden = twin(encoder)(**batch).last_hidden_state
        expected = hidden[:, 0]
        if pooling == "mean":
            lengths = batch["attention_mask"].sum(1).tolist()
            expected = torch.stack([hidden[i, :n].mean(0) for i, n in enumerate(lengths)])
        torch.testing.assert_close(encoder(batch), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_the_pooler_is_the_model_s_own(model_type: str) -> None:
    encoder = text_encoder(model_type, pooling="pooler")
    model = twin(encoder)
    expected = model(**texts()).pooler_output
    torch.testing.assert_close(encoder(texts()), expected, rtol=1e-4, atol=1e-5)
    assert not any(
        "pooler" in name for name, _ in text_encoder(model_type).model.named_parameters()
    )  # nobody trains it


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_padding_does_not_leak(model_type: str, pooling: str) -> None:
    encoder, batch = text_encoder(model_type, pooling=pooling), texts()
    together = encoder(batch)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 0)}
    assert torch.equal(encoder(other), together)  # whatever stands there
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = encoder({name: column[i : i + 1, :n] for name, column in batch.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_type", "longest"), [("bert", 16), ("distilbert", 16), ("roberta", 14)])
def test_texts_up_to_the_longest_that_a_model_reads(model_type: str, longest: int) -> None:
    """RoBERTa's positions begin after the padding's: two of its sixteen are no token's."""
    fits, longer = (InputSpec("text", vocab_size=50, pad_token_id=1, max_length=n) for n in (longest, longest + 1))
    assert text_encoder(model_type, input=fits)(texts((longest, 3))).isfinite().all()
    with pytest.raises(ClplatformError, match=f"stream.max_length={longest + 1}: .* at most {longest} tokens"):
        text_encoder(model_type, input=longer)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tmp_path: Path) -> None:
    text_encoder().model.save_pretrained(tmp_path)
    larger = InputSpec("text", vocab_size=51, pad_token_id=1, max_length=12)
    with pytest.raises(ClplatformError, match="knows 50 tokens, the stream's tokenizer has 51"):
        text_encoder(config=None, pretrained=str(tmp_path), input=larger)


# -- pages --------------------------------------------------------------------------------------------------------------


def page(name: str) -> dict[str, Any]:
    return yaml.safe_load((conf_dir() / "backbone" / f"{name}.yaml").read_text())


def without_download(node: dict[str, Any]) -> bool:
    from importlib.util import find_spec

    package = node.get("package")
    return not node.get("pretrained") or bool(package and find_spec(package) and carries(package, node["pretrained"]))


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "backbone").glob("*.yaml")))
def test_a_page_builds_on_a_fitting_stream(name: str) -> None:
    node = page(name)
    if not without_download(node):
        pytest.skip("its weights would have to be downloaded")
    torch.manual_seed(0)
    target = find(node["_target_"])
    problems = getattr(target, "problems", {"classification"})
    writes = not problems & {"classification"}
    shape: tuple[int, ...] = (4, 12) if writes else (4,)
    if getattr(target, "reads", "pixel_values") == "input_ids":
        spec = InputSpec(
            "text", vocab_size=50, pad_token_id=0, max_length=12, bos_token_id=1, eos_token_id=2, max_target_length=12
        )
        batch: Any = texts()
        batch["decoder_input_ids"] = batch["input_ids"]
    else:
        spec = InputSpec("image", shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
        batch = {"pixel_values": images(4, (1, 8, 8))}
    backbone = make(without_extra({"backbone": node}, "backbone"), input=spec).eval()
    features = backbone(batch)
    assert features.shape == (*shape, backbone.feature_size)
    if writes:
        assert backbone.projection(features).shape == (*shape, 50)
    assert features.isfinite().all()
    assert len(backbone.blocks()) >= 2
    assert backbone.n_tokens >= 1


def test_pages_of_pretrained_models_are_what_hugging_face_calls_them() -> None:
    """A page that says what to download says nothing that needs no download."""
    for path in sorted((conf_dir() / "backbone").glob("*.yaml")):
        node = page(path.stem)
        assert node["name"] == path.stem
        if node.get("pretrained"):
            assert node["config"] is None
            assert node["pretrained"].count("/") == 1


# -- saved models -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_local_folder_gives_the_weights_back(kind: str, tmp_path: Path) -> None:
    make_one: Any = image_encoder if kind == "image" else text_encoder
    batch: Any = {"pixel_values": images()} if kind == "image" else texts()
    original = make_one(seed=3)
    original.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    if kind == "image":
        values = {"image_mean": IMAGES.mean, "image_std": IMAGES.std}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    loaded = make_one(seed=4, config=None, pretrained=str(tmp_path))
    assert loaded.source == str(tmp_path)
    assert torch.equal(loaded(batch), original(batch))
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    changed = make_one(config={"hidden_dropout_prob": 0.4}, pretrained=str(tmp_path))
    assert changed.config.hidden_dropout_prob == 0.4  # the configuration only overrides
    assert torch.equal(changed(batch), original(batch))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_saved_model_needs_its_first_weights_no_more(kind: str, tmp_path: Path) -> None:
    make_one: Any = image_encoder if kind == "image" else text_encoder
    batch: Any = {"pixel_values": images()} if kind == "image" else texts()
    folder, saved = tmp_path / "pretrained", tmp_path / "saved"
    make_one().model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.7] * 3}))
    trained = make_one(config=None, pretrained=str(folder), dropout=0.2)
    trained.save_assets(saved)
    for file in sorted(folder.iterdir()):
        file.unlink()
    folder.rmdir()
    again = make_one(
        seed=5,
        config=None,
        pretrained=str(folder),
        dropout=0.2,
        load_weights=False,
        assets=saved,
        package="antigravity",
    )
    assert not torch.equal(again(batch), trained(batch))
    again.load_state_dict(trained.state_dict())
    assert torch.equal(again(batch), trained(batch))
    assert again.config.hidden_dropout_prob == 0.2


def test_normalisation_is_the_pretrained_model_s_else_the_stream_s(tmp_path: Path) -> None:
    assert image_encoder().pixels.mean.flatten().tolist() == pytest.approx(list(IMAGES.mean or ()))
    image_encoder().model.save_pretrained(tmp_path)
    path, found = tmp_path / "preprocessor_config.json", []
    for values in ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, {"do_normalize": False}, {}, None):
        path.write_text(json.dumps(values)) if values is not None else path.unlink()
        pixels = image_encoder(config=None, pretrained=str(tmp_path)).pixels
        found.append([round(v, 3) for v in (*pixels.mean.flatten().tolist(), *pixels.std.flatten().tolist())])
    assert found == [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.0] * 3 + [1.0] * 3, [0.5] * 6, [0.5] * 6]


def test_the_saved_configuration_is_hugging_face_s(tmp_path: Path) -> None:
    text_encoder("distilbert").save_assets(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "distilbert"


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "takes"), [("bert", True), ("distilbert", False), ("gpt2", False)])
def test_segments_of_pairs_are_told_to_models_that_have_them(model_type: str, takes: bool) -> None:
    encoder, batch = text_encoder(model_type, problem="question_answering"), texts()
    segments = (torch.arange(12) > 3).long().expand(4, 12)
    plain, pair = encoder(batch), encoder({**batch, "token_type_ids": segments})
    assert plain.shape == (4, 12, 16)
    assert torch.equal(plain, pair) != takes
    if takes:
        expected = twin(encoder)(**batch, token_type_ids=segments).last_hidden_state
        torch.testing.assert_close(pair, expected, rtol=1e-4, atol=1e-5)
