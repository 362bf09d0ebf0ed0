"""The saved model answers as the trained one did, bit for bit, and refuses what it cannot answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import BERT, TOPICS, VIT, text_stream, trained
from encoders import config, image_encoder
from strategies import NAMES, from_page, is_for_transformers, needs_tuning, scenario_of
from torch import Tensor
from torch.nn import functional as F

import clplatform
from clplatform.files import read_json, write_json
from clplatform.saved import Predictor, load, model_folder
from clplatform.types import ClplatformError, InputSpec

# Two experiences of five digits each, unless they are said to be others.
DIGITS = [*VIT, "strategy=finetuning", "stream.n_experiences=2"]
TASKS = ["stream.scenario=task_incremental"]
RUNS: dict[str, list[str]] = {
    "image": DIGITS,
    "image, mean, smoothed": [*DIGITS, "backbone.pooling=mean", "label_smoothing=0.1", "backbone.freeze=1"],
    "image, perceptron": ["backbone=mlp", "backbone.hidden=[30]", "strategy=finetuning", "stream.n_experiences=2"],
    "image, task ids": [*DIGITS, *TASKS],
    "image, multi": [*DIGITS, *TASKS, "head=multi"],
    "image, cosine": [*DIGITS, "head=cosine"],
    "image, domains": [*DIGITS, "stream.scenario=domain_incremental"],
    "image, experts": [*DIGITS, "strategy=lora_experts"],
    "image, experts, multi": [*DIGITS, *TASKS, "strategy=lora_experts", "head=multi"],
    "text": [*BERT, "strategy=finetuning"],
    "text, multi": [*BERT, *TASKS, "strategy=finetuning", "head=multi"],
    "text, experts": [*BERT, "strategy=lora_experts", "backbone.pooling=pooler"],
    "text, pairs": [*BERT, "strategy=finetuning"],
}
Get = Callable[[str], Any]


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """The finished experiment of one of `RUNS`, made once."""
    made: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            stream = text_stream(folder / "data", pairs="pairs" in name) if name.startswith("text") else []
            made[name] = trained(folder / "run", *stream, *RUNS[name])
        return made[name]

    return run


def inputs_of(experience: Any, name: str) -> tuple[Any, Any]:
    """What a user would give for this experience's test data, and the batch that the stream makes of it."""
    batch = experience.test.fetch(torch.arange(len(experience.test)))
    if not name.startswith("text"):
        return batch["pixel_values"].numpy(), batch
    labels = [list(TOPICS)[k] for k in batch["labels"]]
    numbers = batch["index"].tolist()
    numbers = [(n - min(numbers)) % 12 for n in numbers]
    texts: list[Any] = [f"{TOPICS[label][n % 4]} {n}" for label, n in zip(labels, numbers, strict=True)]
    if "pairs" in name:
        texts = [(t, TOPICS[label][(n + 1) % 4]) for t, label, n in zip(texts, labels, numbers, strict=True)]
    return texts, batch


@torch.no_grad()
def logits_of(learner: Any, batch: Any) -> Tensor:
    return learner(batch).logits


# -- the same answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_it_answers_as_the_trained_learner_did(name: str, get: Get) -> None:
    run = get(name)
    predictor = clplatform.load(run.run_dir)
    for experience in run.stream:
        inputs, batch = inputs_of(experience, name)
        task = experience.task_label if run.stream.info.task_ids else None
        expected = logits_of(run.learner, batch)
        assert torch.equal(predictor.logits(inputs, task=task), expected)
        parts = [logits_of(run.learner, experience.test.fetch(rows)) for rows in torch.arange(len(expected)).split(7)]
        assert torch.equal(predictor.logits(inputs, task=task, batch_size=7), torch.cat(parts))


@pytest.mark.filterwarnings("ignore")  # of libraries that a strategy imports
@pytest.mark.parametrize("name", [n for n in NAMES if "classification" in from_page(n).problems])
def test_whatever_it_was_trained_with(name: str, tmp_path: Path) -> None:
    """Every page of `conf/strategy/`: what a strategy adds to the model is rebuilt from metadata and loaded."""
    backbone = VIT if is_for_transformers(name) else ["backbone=mlp", "backbone.hidden=[16]"]
    if "pretrained" in from_page(name).needs:
        image_encoder(
            config=config("vit", image_size=8, patch_size=2, num_hidden_layers=5),  # as many as prompts are put into
            input=InputSpec("image", shape=(1, 8, 8), mean=(0.5,), std=(0.5,)),
        ).model.save_pretrained(tmp_path / "weights")
        backbone = [f"backbone.pretrained={tmp_path / 'weights'}", "backbone.config=null"]
    tasks = [f"stream.scenario={scenario_of(name)}"]
    tuning = ["tuning=lora"] if needs_tuning(name) else []
    run = trained(tmp_path, *backbone, f"strategy={name}", "stream.n_experiences=2", *tasks, *tuning)
    predictor = load(tmp_path)
    for experience in run.stream:
        inputs, batch = inputs_of(experience, "image")
        task = experience.task_label if run.stream.info.task_ids else None
        assert torch.equal(predictor.logits(inputs, task=task), logits_of(run.learner, batch))


def test_predictions_are_the_softmax_of_the_logits(get: Get) -> None:
    run = get("image")
    predictor = load(run.run_dir)
    inputs, batch = inputs_of(run.stream[1], "image")
    p = F.softmax(logits_of(run.learner, batch).double(), dim=1)
    found = predictor.predict(inputs, top=4)
    assert len(found) == len(inputs)
    for row, answer in zip(p, found, strict=True):
        best = row.argsort(descending=True)[:4].tolist()
        assert answer.class_index == best[0]
        assert answer.label == predictor.class_names[best[0]] == run.stream.info.class_names[best[0]]
        assert list(answer.probabilities) == [predictor.class_names[k] for k in best]
        assert list(answer.probabilities.values()) == pytest.approx(row[best].tolist(), rel=1e-5)
        assert answer.probability == answer.probabilities[answer.label]
    assert len(predictor.predict(inputs[:1], top=99)[0].probabilities) == 10


@pytest.mark.parametrize("name", ["image, multi", "image, task ids", "image, experts, multi"])
def test_with_task_ids_only_the_task_s_classes_are_named(name: str, get: Get) -> None:
    run = get(name)
    predictor = load(run.run_dir)
    for experience in run.stream:
        own = {run.stream.info.class_names[k] for k in experience.classes}
        for answer in predictor.predict(inputs_of(run.stream[0], name)[0], task=experience.task_label, top=10):
            assert set(answer.probabilities) == own
            assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_class_names_of_domains_and_of_what_is_learned_so_far(get: Get) -> None:
    assert load(get("image, domains").run_dir).class_names == ["0 / 5", "1 / 6", "2 / 7", "3 / 8", "4 / 9"]
    assert load(get("text").run_dir).class_names == list(TOPICS)


def test_the_model_folder_is_enough(get: Get, tmp_path: Path) -> None:
    """Without the run, the data, or anything else of where it was trained."""
    for name in ("text, multi", "image, experts"):
        run = get(name)
        shutil.copytree(run.run_dir / "model", tmp_path / name)
        inputs, batch = inputs_of(run.stream[1], name)
        task = 1 if "multi" in name else None
        assert torch.equal(load(tmp_path / name).logits(inputs, task=task), logits_of(run.learner, batch))


def test_a_pretrained_backbone_s_folder_is_no_longer_needed(tmp_path: Path) -> None:
    from encoders import text_encoder

    from clplatform.stream.tokenizer import train_wordpiece
    from clplatform.types import InputSpec

    folder = tmp_path / "pretrained"
    tokenizer = train_wordpiece([t for texts in TOPICS.values() for t in texts], 200)
    spec = InputSpec("text", vocab_size=len(tokenizer), pad_token_id=0, max_length=16)
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 16, "max_position_embeddings": 64}  # fmt: skip
    text_encoder(input=spec, config=config).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stream = text_stream(tmp_path / "data")
    chosen = ["backbone=minilm", f"backbone.pretrained={folder}", "backbone.freeze=0", "strategy=finetuning"]
    run = trained(tmp_path / "run", *stream, *chosen)
    assert run.learner.backbone.source == str(folder)
    shutil.rmtree(folder)
    inputs, batch = inputs_of(run.stream[0], "text")
    assert torch.equal(load(tmp_path / "run").logits(inputs), logits_of(run.learner, batch))


# -- what it reads ------------------------------------------------------------------------------------------------------


def test_arrays_in_every_form_are_the_same_images(get: Get) -> None:
    run = get("image")
    predictor, x = load(run.run_dir), inputs_of(run.stream[0], "image")[0]
    expected = predictor.logits(x)
    assert x.shape[1:] == (1, 8, 8)
    for form in (x[:, 0], torch.from_numpy(x), x.astype(np.int64), x / 255, (x / 255).astype(np.float32), x.tolist()):
        assert torch.equal(predictor.logits(form), expected)
    colour = np.repeat(x, 3, axis=1)
    torch.testing.assert_close(predictor.logits(colour), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["image", "text"])
def test_of_nothing_there_are_no_answers(name: str, get: Get) -> None:
    predictor = load(get(name).run_dir)
    assert predictor.predict([]) == []
    assert predictor.logits([]).shape == (0, len(predictor.class_names))


def test_one_text_is_a_list_of_one_and_its_length_has_no_say(get: Get) -> None:
    predictor = load(get("text").run_dir)
    text = "what is my balance"
    alone = predictor.logits(text)
    assert torch.equal(alone, predictor.logits([text]))
    beside = predictor.logits([text, "a much longer text about " + "many things " * 60])
    torch.testing.assert_close(beside[:1], alone, rtol=1e-4, atol=1e-5)
    beside = predictor.logits([text, "a much longer text about " + "many things " * 60], batch_size=1)
    assert torch.equal(beside[:1], alone)


@pytest.mark.parametrize(
    ("name", "inputs", "options", "message"),
    [
        ("image", np.zeros((2, 8)), {}, r"\[N, H, W\] or \[N, C, H, W\], not \[2, 8\]"),
        ("image", np.full((1, 8, 8), 7.0), {}, "images as floats lie in 0 … 1; these reach from 7 to 7"),
        ("image", np.full((1, 8, 8), -1), {}, "images as integers lie in 0 … 255"),
        ("image", np.zeros((1, 4, 8, 8)), {}, "the images have 4 channels, the model expects 1"),
        ("image", ["absent.png"], {}, "there is no file absent.png"),
        ("image", np.zeros((1, 8, 8)), {"task": 1}, r"task 1: the model has learned tasks \[0\]"),
        ("image", np.zeros((1, 8, 8)), {"batch_size": 0}, "batch_size=0: give 1 or more"),
        ("image, multi", np.zeros((1, 8, 8)), {}, r"trained with task ids: say which task, of \[0, 1\]"),
        ("image, multi", np.zeros((1, 8, 8)), {"task": 2}, r"task 2: the model has learned tasks \[0, 1\]"),
        ("text", ["fine", "  "], {}, "sample 1: '  ' is not a text"),
        ("text", ["fine", 3], {}, "sample 1: 3 is not a text"),
        ("text", ["fine", ("a", "b")], {}, r"sample 1: \('a', 'b'\) is not a text"),
        ("text", [None], {}, "sample 0: None is not a pair of texts"),
        ("text, pairs", [("a", "b"), ("a", "")], {}, r"sample 1: \('a', ''\) is not a pair of texts"),
        ("text, pairs", [("a", "b"), ("a", "b", "c")], {}, "sample 1: .* is not a pair of texts"),
        ("text, pairs", [("a", "b"), "a"], {}, "sample 1: 'a' is not a pair of texts"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, inputs: Any, options: Any, message: str, get: Get) -> None:
    with pytest.raises(ClplatformError, match=message):
        load(get(name).run_dir).logits(inputs, **options)


def test_a_number_of_probabilities_below_one_is_refused(get: Get) -> None:
    with pytest.raises(ClplatformError, match="top=0: give 1 or more"):
        load(get("image").run_dir).predict(np.zeros((1, 8, 8)), top=0)


# -- the folder ---------------------------------------------------------------------------------------------------------


def test_what_a_model_folder_holds(get: Get) -> None:
    run = get("text, multi")
    names = {path.name for path in (run.run_dir / "model").iterdir()}
    assert {"model.safetensors", "config.json", "clplatform.json", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".ckpt")) or name.startswith((".", "tmp")) for name in names)
    saved = read_json(run.run_dir / "model" / "clplatform.json")
    assert saved["config"] == run.config
    assert [e["classes"] for e in saved["experiences"]] == [[0, 1], [2, 3]]


def test_where_a_model_is_looked_for(get: Get, tmp_path: Path) -> None:
    run = get("image").run_dir
    assert model_folder(run) == model_folder(run / "model") == run / "model"
    with pytest.raises(ClplatformError, match="neither a run directory nor a saved model"):
        load(tmp_path)
    shutil.copy(run / "results.json", tmp_path)
    with pytest.raises(ClplatformError, match=f"no saved model yet; finish it with `clplatform resume {tmp_path}`"):
        load(tmp_path)


def damaged(run: Any, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a saved model with a changed description."""
    shutil.copytree(run.run_dir / "model", folder, dirs_exist_ok=True)
    saved = read_json(folder / "clplatform.json")
    change(saved)
    write_json(folder / "clplatform.json", saved)
    return folder


def test_a_damaged_model_is_named(get: Get, tmp_path: Path) -> None:
    run = get("image")
    for i, (change, message) in enumerate(
        (
            (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is not the model's or is damaged"),
            (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors is not .* or is damaged"),
            (
                lambda f: shutil.copy(get("image, perceptron").run_dir / "model" / "model.safetensors", f),
                "size mismatch",
            ),
            (lambda f: (f / "clplatform.json").write_text("{"), "clplatform.json is damaged"),
            (lambda f: damaged(run, f, lambda s: s.update(schema_version=9)), "is of version 9; this clplatform reads"),
        )
    ):
        folder = tmp_path / str(i)
        shutil.copytree(run.run_dir / "model", folder)
        change(folder)
        with pytest.raises(ClplatformError, match=message):
            load(folder)
    with pytest.raises(ClplatformError, match="device=nowhere: "):
        load(run.run_dir, device="nowhere")


# -- trust --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "node"),
    [
        ("optimizer", {"_target_": "subprocess.run", "args": "touch ran"}),
        ("optimizer", {"_target_": "clplatform.files.os.system", "command": "touch ran"}),
        ("backbone", {"_target_": "clplatform.config.Path.touch", "name": "x", "self": "ran"}),
        ("scheduler", {"_target_": "torch.optim.swa_utils.torch.load", "f": "ran"}),
        ("head", {"_target_": "clplatform.backbone.pretrained.os.system", "command": "touch ran"}),
        ("strategy", {"a": {"_target_": "clplatform.strategy.base.Strategy", "x": [{"_target_": "os.remove"}]}}),
        ("head", {"_target_": "clplatform_but_not_ours.Head"}),
        ("head", {"_target_": "clplatform.cli.main", "arguments": ["optimizer._target_=os.system"]}),
    ],
)
def test_nothing_is_built_that_is_not_ours(group: str, node: Any, get: Get, tmp_path: Path) -> None:
    """Whoever made the file may have written anything into it."""
    folder = damaged(get("image"), tmp_path / "model", lambda saved: saved["config"].update({group: node}))
    with pytest.raises(ClplatformError, match="the run's configuration builds .* which is not part of clplatform"):
        load(folder)
    assert not Path("ran").exists()


OWN = """
from clplatform.head.linear import LinearHead

class Doubled(LinearHead):
    def forward(self, features, task_labels):
        return 2 * super().forward(features, task_labels)
"""


def test_what_is_trusted_is_built(get: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_heads.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "own_heads.Doubled"}
    folder = damaged(get("image"), tmp_path / "model", lambda saved: saved["config"].update(head=node))
    with pytest.raises(ClplatformError, match=r"builds 'own_heads.Doubled'.*trust='own_heads'"):
        load(folder)
    x = inputs_of(get("image").stream[0], "image")[0]
    for trust in ("own_heads", "own_heads.", ("another", "own_heads.Doubled")):
        assert torch.equal(load(folder, trust=trust).logits(x), 2 * load(get("image").run_dir).logits(x))


def test_a_predictor_can_be_made_of_any_learner(get: Get) -> None:
    """`load` is not the only way: a notebook has the learner at hand."""
    run = get("image")
    predictor = Predictor(run.learner, run.run_dir)
    x, batch = inputs_of(run.stream[0], "image")
    assert torch.equal(predictor.logits(x), logits_of(run.learner, batch))
    assert json.loads(json.dumps([a.__dict__ for a in predictor.predict(x)]))[0]["label"] in predictor.class_names
    assert replace(predictor.predict(x)[0], label="other").label == "other"
