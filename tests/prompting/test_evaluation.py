"""Scores against texts that are taken one by one, runs that are the same with and without, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, only_run, refused
from composed import configuration

from clplatform import build
from clplatform.files import read_json
from clplatform.prompting.evaluation import Prompting, Questions, same
from clplatform.prompting.task import CONTENT_FREE, PromptedTask
from clplatform.results import Results

Capture = pytest.CaptureFixture[str]

SAYINGS = {"cats": "the cat is good and the mouse is bad", "dogs": "the dog is bad and the bone is good"}
SETTINGS = [
    "stream=text_domains", "stream.max_length=32", "stream.tokenizer_vocab_size=300", "backbone=transformer_decoder",
    "backbone.size=16", "backbone.n_layers=1", "backbone.n_heads=2", "backbone.inner_size=32", "backbone.dropout=0.1",
    "strategy=replay", "threads=1", "trainer.max_epochs=1", "+trainer.limit_train_batches=3", "trainer.accelerator=cpu",
    "batch_size=4", "eval_batch_size=16", "tracking=local",
]  # fmt: skip
WORDS = {"pos": "good", "neg": "really bad"}


def domains(folder: Path) -> list[str]:
    """Two small domains of text."""
    for name, saying in SAYINGS.items():
        path = folder / "texts" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{saying} {i}.\n" for i in range(150)))
    return [*SETTINGS, f"stream.data_dir={folder / 'texts'}"]


def files(folder: Path, n: int = 7) -> tuple[str, str]:
    """Training and test file of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [
            {"text": f"the {'cat' if i % 2 else 'dog'} {split} {i}", "label": "pos" if i % 3 else "neg"}
            for i in range(n)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "train.jsonl"), str(folder / "test.jsonl")


def task(folder: Path, **changes: Any) -> PromptedTask:
    train, test = files(folder)
    settings: dict[str, Any] = {"name": "mood", "train": train, "test": test, "template": "{text} is {label}",
                                "verbalisers": WORDS}  # fmt: skip
    return PromptedTask(**{**settings, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    config = configuration(*(s for s in domains(tmp_path_factory.mktemp("model")) if not s.startswith("+")))
    stream: Any = build.build_stream(config)
    learner = build.build_learner(config, stream.info, build.build_strategies(config))
    learner.build(stream[0].info)
    with torch.no_grad():
        for p in learner.parameters():
            p.mul_(3)  # so that answers differ
    return learner, stream


def one_by_one(model: tuple[Any, Any], task: PromptedTask, text: str) -> tuple[list[float], list[int]]:
    """log p of the words of each label after a prompt, and their tokens, from whole texts without padding."""
    learner, stream = model
    totals, counts = [], []
    for words in task.verbalisers.values():
        prompt = task.examples() + task.prompt(text).rstrip(" ")
        ids = [
            stream.info.input.eos_token_id,
            *stream.tokenizer(f"{prompt} {words}", add_special_tokens=False)["input_ids"],
        ]
        n = len(stream.tokenizer(f" {words}", add_special_tokens=False)["input_ids"])
        ids = ids[-33:]
        with torch.no_grad():
            log_p = (
                learner.eval()
                .backbone.projection(learner.backbone.model.decoder(torch.tensor([ids[:-1]])))[0]
                .log_softmax(-1)
            )
        totals.append(sum(float(log_p[-n + k, ids[len(ids) - n + k]]) for k in range(n)))
        counts.append(n)
    return totals, counts


@pytest.mark.parametrize("settings", [{}, {"normalised": False}, {"shots": 2}, {"calibrated": True},
                                      {"shots": 1, "normalised": False, "calibrated": True}])  # fmt: skip
def test_accuracy_is_that_of_texts_taken_one_by_one(
    settings: dict[str, Any], model: tuple[Any, Any], tmp_path: Path
) -> None:
    learner, stream = model
    asked = task(tmp_path, **settings)
    texts, labels = asked.read(asked.test)

    def scores(text: str) -> list[float]:
        totals, counts = one_by_one(model, asked, text)
        assert counts[1] > counts[0]  # so that it matters
        return [t / n for t, n in zip(totals, counts, strict=True)] if asked.normalised else totals

    expected = torch.tensor([scores(text) for text in texts], dtype=torch.float64)
    answers = torch.tensor([asked.labels.index(label) for label in labels])
    free = torch.tensor([scores(text) for text in CONTENT_FREE], dtype=torch.float64).softmax(1).mean(0)
    best = (expected.softmax(1) / free if asked.calibrated else expected).argmax(1)
    for batch_size in (3, 100):
        questions = Questions(asked, stream.tokenizer, stream.info.input)
        torch.testing.assert_close(questions.scores(learner, batch_size)[: len(texts)], expected, rtol=1e-4, atol=1e-4)
        assert questions.accuracy(learner, batch_size) == pytest.approx(float((best == answers).double().mean()))


def test_limit_and_what_is_cut(model: tuple[Any, Any], tmp_path: Path) -> None:
    _, stream = model
    few = Questions(task(tmp_path, limit=3), stream.tokenizer, stream.info.input)
    assert len(few.answers) == 3 and len(few.data) == 6 and few.notes() == []
    long = Questions(task(tmp_path, shots=5), stream.tokenizer, stream.info.input)
    assert long.data.columns["attention_mask"].sum(1).max() == 32
    assert long.notes() == [
        "prompting.mood: 7 of 7 prompts are cut, from their beginning, to the 32 tokens that the model reads"
    ]


def test_words_may_change_the_end_of_a_prompt() -> None:
    assert same([1, 2, 3], [1, 2, 4, 5]) == 2 and same([1, 2], [1, 2, 3]) == 2 and same([], [1]) == 0


def test_a_row_that_is_missing_is_asked_for_when_the_run_goes_on(model: tuple[Any, Any], tmp_path: Path) -> None:
    learner, stream = model
    results = Results(run_id="x", seed=0, stream={}, backbone={}, strategy=[], primary_metric={}, code={})
    watcher = Prompting([Questions(task(tmp_path), stream.tokenizer, stream.info.input)], results, 16)
    watcher.finish_experience(None, results, learner)
    (first,) = results.prompting["mood"]
    watcher.start_experience(stream[1], learner, 1)  # of the first experience there is none
    assert results.prompting["mood"] == [first, first]
    watcher.start_experience(stream[1], learner, 1)
    assert results.prompting["mood"] == [first, first]
    watcher.finish_experience(stream[1].info, results, learner)
    assert results.prompting["mood"] == [first, first, first]


def prompted(folder: Path, **more: Any) -> str:
    train, test = files(folder)
    words = ",".join(f"{label}: {word}" for label, word in WORDS.items())
    settings = {"train": train, "test": test, "template": "'{text} is {label}'", "verbalisers": f"{{{words}}}", **more}
    return "prompting={mood: {" + ", ".join(f"{k}: {v}" for k, v in settings.items()) + "}}"


def test_a_run_learns_the_same_with_it_and_reports_it(capsys: Capture, tmp_path: Path, monkeypatch: Any) -> None:
    settings, found = domains(tmp_path), {}
    for name, more in (("plain", []), ("asked", [prompted(tmp_path, shots=1)])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        done = call(capsys, *settings, *more)
        assert done.code == 0, done.err
        found[name] = Path.cwd() / only_run()
    plain, asked = (read_json(found[name] / "results.json") for name in ("plain", "asked"))
    assert plain["matrix"] == asked["matrix"] and plain["scores"] == asked["scores"]
    assert plain["cost"]["flops"] == asked["cost"]["flops"]
    assert plain["prompting"] == {}
    (row,) = asked["prompting"].values()
    assert len(row) == 3 and all(0 <= v <= 1 for v in row)
    page = (found["asked"] / "report.html").read_text()
    assert "Zero- and few-shot accuracy" in page and "mood" in page
    assert "Zero- and few-shot accuracy" not in (found["plain"] / "report.html").read_text()


def test_what_cannot_be_prompted_is_refused_before_training(capsys: Capture, tmp_path: Path) -> None:
    asked = prompted(tmp_path)
    assert refused(capsys, *domains(tmp_path), asked, "stream.scenario=task_incremental").startswith(
        "prompting: its tasks have no task id, which stream=text_domains offers at inference"
    )
    assert "prompting asks causal language models, and stream=split_digits is classification" in refused(
        capsys, "threads=1", "tracking=local", asked
    )
    missing = prompted(tmp_path, test=tmp_path / "none.csv")
    assert refused(capsys, *domains(tmp_path), missing) == f"there is no file {tmp_path / 'none.csv'}"
    assert "prompting.mood.shots=-1" in refused(capsys, *domains(tmp_path), prompted(tmp_path, shots=-1))


def test_a_hugging_face_model_is_asked_alike(tmp_path: Path) -> None:
    small = ["backbone=gpt2_tiny", "backbone.config.n_embd=16", "backbone.config.n_layer=1", "backbone.config.n_head=2"]
    settings = [s for s in domains(tmp_path) if not s.startswith(("+", "backbone"))]
    config = configuration(*settings, *small)
    stream: Any = build.build_stream(config)
    learner = build.build_learner(config, stream.info, build.build_strategies(config))
    learner.build(stream[0].info)
    learner.eval()
    asked = task(tmp_path)
    questions = Questions(asked, stream.tokenizer, stream.info.input)
    found = questions.scores(learner, 5)
    rows = [questions.data.fetch(torch.tensor([i])) for i in range(len(questions.data))]
    with torch.no_grad():
        for i, row in enumerate(rows):
            log_p = learner.backbone.model(input_ids=row["input_ids"]).logits[0].log_softmax(-1)
            scored = [(t, label) for t, label in enumerate(row["labels"][0].tolist()) if label >= 0]
            mean = sum(float(log_p[t, label]) for t, label in scored) / len(scored)
            assert float(found[i // 2, i % 2]) == pytest.approx(mean, rel=1e-4)
