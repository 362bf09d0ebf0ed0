"""Token classification and question answering run like everything else: learned, forgotten, kept by strategies, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import configuration
from composed import experiment as composed_experiment
from span_world import config, contexts, experiment, run, squad
from strategies import NAMES as STRATEGIES
from strategies import from_page, needs_tuning
from torch.nn import functional as F

from clplatform import build
from clplatform.data import concat, predicted
from clplatform.evaluate import answers, evaluate_row, score
from clplatform.experiment import Experiment
from clplatform.head.span import best_spans, over_windows
from clplatform.protocol.tune_first import FirstExperiences
from clplatform.run import execute
from clplatform.saved import load
from clplatform.types import IGNORED, MASKED, ClplatformError, Output

PROBLEMS = ("token_classification", "question_answering")
METRIC = {"token_classification": "span_f1", "question_answering": "answer_f1"}
CHANGES = {"ewc": ["strategy.ewc.fisher=sampled"], "a_gem": ["strategy.a_gem.policy=reservoir"]}
GENERAL = [
    (name, problem) for name in STRATEGIES for problem in PROBLEMS if problem in from_page(name).problems
]  # fmt: skip
TASKS = "stream.scenario=task_incremental"


def chosen(name: str) -> list[str]:
    ids = "task_ids" in from_page(name).needs or name in ("lora_experts", "tuning_experts")
    tuning = ["tuning=lora"] if needs_tuning(name) else []
    return [f"strategy={name}", *CHANGES.get(name, []), *([TASKS] if ids else []), *tuning]


LEARN = ["trainer.max_epochs=30", "trainer.limit_train_batches=1.0", "batch_size=8"]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_is_learned_and_forgotten_and_replay_forgets_less(problem: str, tmp_path: Path) -> None:
    plain = run(problem, tmp_path / "plain", "strategy=finetuning", *LEARN)
    replay = run(problem, tmp_path / "replay", "strategy=replay", *LEARN)
    assert plain.primary_metric["name"] == METRIC[problem]
    assert plain.metrics["learning_accuracy"] > 0.8
    rows = [only for only in plain.matrix if only]
    assert len(rows) == 3 and all(len(row) == 2 for row in rows)
    untrained = plain.matrix[0]
    assert untrained[1] is None if problem == "token_classification" else untrained[1] < 0.7
    assert plain.metrics["average_forgetting"] > 0.1
    assert replay.metrics["average_forgetting"] < plain.metrics["average_forgetting"]
    assert set(plain.scores) == {"token_accuracy"} if problem == "token_classification" else {"exact_match"}


@pytest.mark.parametrize(("name", "problem"), GENERAL)
def test_a_general_strategy_runs_and_resumes_to_the_bit(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(problem, tmp_path, *chosen(name), "trainer.max_epochs=2")
    whole = execute(settings, tmp_path / "whole", quiet=True)
    assert all(value is not None for value in whole.matrix[-1])
    learn = Experiment._learn

    def stop(self: Any, experience: Any, *, resume: bool) -> None:
        if experience.index == 1:
            raise KeyboardInterrupt
        learn(self, experience, resume=resume)

    monkeypatch.setattr(Experiment, "_learn", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        execute(settings, tmp_path / "half", quiet=True)
    monkeypatch.setattr(Experiment, "_learn", learn)
    half = execute(settings, tmp_path / "half", resume=True, quiet=True)
    assert half.matrix == whole.matrix and half.scores == whole.scores
    a, b = ((tmp_path / f / "model" / "model.safetensors").read_bytes() for f in ("whole", "half"))
    assert a == b


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["ewc", "lwf", "si", "mas", "l2_anchor"])
def test_a_strategy_changes_what_is_learned(name: str, problem: str, tmp_path: Path) -> None:
    for own in (name, "finetuning"):
        settings = config(problem, tmp_path, *chosen(own), f"strategy.{name}.strength=100" if own == name else "seed=0")
        execute(settings, tmp_path / own, quiet=True)
    a, b = ((tmp_path / f / "model" / "model.safetensors").read_bytes() for f in (name, "finetuning"))
    assert a != b


@pytest.mark.parametrize(
    ("problem", "overrides", "message"),
    [
        ("token_classification", ["strategy=replay", "strategy.replay.policy=herding"], "policy balances classes"),
        ("question_answering", ["strategy=a_gem"], "policy balances classes"),
        ("token_classification", ["strategy=ewc", "strategy.ewc.fisher=exact"], "exact sums over all tokens"),
        ("question_answering", ["strategy=icarl"], "strategy=icarl learns classification, .* is question_answering"),
        ("question_answering", ["strategy=lora_experts", TASKS], "strategy=lora_experts learns .* question_answering"),
        ("token_classification", ["strategy=lora_experts"], "give stream.scenario=task_incremental"),
        (
            "question_answering",
            ["strategy=finetuning", "head=cosine"],
            "a span has a head of its own; leave head=single",
        ),
        ("question_answering", ["strategy=finetuning", "backbone=mlp"], "backbone=mlp learns classification"),
    ],
)
def test_what_does_not_fit_is_refused(problem: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    from composed import configuration
    from span_world import files

    size = [] if "backbone=mlp" in overrides else ["backbone=transformer_text"]
    with pytest.raises(ClplatformError, match=message):
        execute(configuration(*files(problem, tmp_path / "data"), *size, *overrides), tmp_path / "run", quiet=True)


# -- the parts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["single", "cosine", "multi"])
def test_with_task_ids_a_token_may_have_its_task_s_classes_only(head: str, tmp_path: Path) -> None:
    made = experiment("token_classification", tmp_path, "strategy=finetuning", TASKS, f"head={head}")
    learner, stream = made.learner, made.stream
    learner.build(stream[1].info)
    learner.eval()
    for e in stream:
        batch = e.test.fetch(torch.arange(4))
        logits = learner(batch).logits
        assert logits.shape == (*batch["input_ids"].shape, 9)
        closed = (logits <= MASKED / 2).flatten(0, 1)
        own = torch.zeros(9, dtype=torch.bool)
        own[list(e.classes)] = True
        assert torch.equal(closed, (~own).expand_as(closed))
        assert 0 in e.classes and len(e.classes) == 5
    both = concat([e.test.fetch(torch.arange(2)) for e in stream])
    alone = [learner({n: c[i : i + 1] for n, c in both.items()}).logits for i in range(4)]
    torch.testing.assert_close(learner(both).logits, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_smoothed_or_not_is_over_what_may_be(problem: str, tmp_path: Path) -> None:
    made = experiment(problem, tmp_path, "strategy=finetuning", TASKS, "label_smoothing=0.2")
    learner, stream = made.learner, made.stream
    learner.build(stream[1].info)
    batch = stream[1].train.fetch(torch.arange(6))
    output = learner.eval()(batch)
    labels, logits = predicted(batch, batch["labels"]), predicted(batch, output.logits)
    each = []
    for label, row in zip(labels, logits, strict=True):
        log_p = row[row > MASKED / 2].log_softmax(0)
        n_before = int((row[: int(label)] > MASKED / 2).sum())
        each.append(-(0.8 * log_p[n_before] + 0.2 * log_p.mean()))
    expected = torch.stack(each)
    torch.testing.assert_close(learner.task_loss(batch, output), expected.mean(), rtol=1e-4, atol=1e-5)
    rows = (batch["labels"] != IGNORED).sum(1).tolist()
    own = torch.stack([part.sum() for part in expected.split(rows)])
    torch.testing.assert_close(learner.task_loss(batch, output, "none"), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.task_loss(batch, output, "sum"), own.sum(), rtol=1e-4, atol=1e-5)
    learner.label_smoothing = 0.0
    plain = F.cross_entropy(logits, labels)
    torch.testing.assert_close(learner.task_loss(batch, output), plain, rtol=1e-4, atol=1e-5)


def test_entities_are_scored_among_the_types_of_their_experience(tmp_path: Path) -> None:
    """A perfect model of all types makes no mistake on an experience that annotates two."""
    made = experiment("token_classification", tmp_path, "strategy=finetuning")
    learner, stream = made.learner, made.stream
    learner.build(stream[1].info)
    names = stream.info.class_names
    everything = {}
    for e in stream:
        batch = e.test.fetch(torch.arange(len(e.test)))
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            own = everything.setdefault(tuple(row), [0] * len(row))
            everything[tuple(row)] = [max(a, b) for a, b in zip(own, labels, strict=True)]

    def perfect(batch: Any) -> Any:
        width = len(next(iter(everything)))
        rows = F.pad(batch["input_ids"], (0, width - batch["input_ids"].shape[1])).tolist()
        known = torch.tensor([everything[tuple(row)] for row in rows])[:, : batch["input_ids"].shape[1]].clamp(min=0)
        features = torch.zeros(*known.shape, 16)
        from clplatform.types import Output

        return Output(F.one_hot(known, len(names)).float(), features)

    learner.forward = perfect
    for e in stream:
        assert score(learner, stream, e, e.test, 5) == {"token_accuracy": 1.0, "span_f1": 1.0}
    first = next(row for row, labels in everything.items() if any(labels))
    everything[first] = [0] * len(first)  # one sentence in which it finds nothing
    scores = [score(learner, stream, e, e.test, 5) for e in stream]
    assert any(s["span_f1"] < 1 for s in scores)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_trials_of_a_protocol_are_scored_on_the_validation_split(problem: str, tmp_path: Path) -> None:
    made = experiment(problem, tmp_path, "strategy=finetuning")
    trial = FirstExperiences(made.stream, 1)
    e = made.stream[0]
    assert evaluate_row(made.learner, trial, "test", 8) == [score(made.learner, made.stream, e, e.validation, 8)]


def test_best_spans_are_those_of_a_search_over_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (2, 7, 40):
        logits = torch.randn(6, 2, n, generator=generator)
        for row, (a, b), score_, none in zip(logits, *(x.tolist() for x in best_spans(logits)), strict=True):
            allowed = [(i, j) for i in range(1, n) for j in range(i, min(n, i + 30))]
            assert (a, b) == max(allowed, key=lambda s: float(row[0, s[0]] + row[1, s[1]]))
            assert score_ == float(row[0, a] + row[1, b]) and none == float(row[0, 0] + row[1, 0])


def test_the_best_window_of_a_question_answers_it() -> None:
    generator = torch.Generator().manual_seed(1)
    questions = torch.tensor([7, 7, 7, 2, 9, 9, 2, 5])
    for _ in range(20):
        score_, none = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
        window, answered = over_windows(questions, score_, none)
        for i, question in enumerate([7, 2, 9, 5]):
            own = [k for k in range(8) if questions[k] == question]
            assert window[i] == max(own, key=lambda k: float(score_[k]))
            assert answered[i] == (max(score_[own]) > min(none[own]))
    window, answered = over_windows(torch.zeros(0).long(), torch.zeros(0), torch.zeros(0))
    assert window.tolist() == answered.tolist() == []


def test_answers_are_read_where_the_model_points(tmp_path: Path) -> None:
    made = experiment("question_answering", tmp_path, "strategy=finetuning")
    learner, stream = made.learner, made.stream

    learner.forward = perfect
    for e in stream:
        rows = answers(learner, stream, e.test, 3)
        assert [row[2] for row in rows] == [row[1][0] for row in rows]
        assert score(learner, stream, e, e.test, 3) == {"answer_f1": 1.0, "exact_match": 1.0}
        assert all(row[0].startswith(f"what is {e.name} ?\n") for row in rows)


def perfect(batch: Any) -> Output:
    """A model that points at the labels, and elsewhere is sure that there is no answer."""
    logits = torch.zeros(len(batch["labels"]), 2, batch["input_ids"].shape[1])
    return Output(logits.scatter(2, batch["labels"].clamp(min=0)[:, :, None], 1.0), logits)


def long_contexts(folder: Path) -> list[str]:
    """Contexts of which 24 tokens hold a part only, and answers anywhere in them."""
    folder.mkdir(parents=True)
    filler = "it was and it is and it will be as it ever was in all of the days and nights "
    texts = [filler * (i % 4) + text + " " + filler * (3 - i % 4) for i, text in enumerate(contexts("color", 24))]
    (folder / "color.json").write_text(json.dumps(squad("color", texts, impossible=True)))
    return [
        "stream=question_answering",
        f"stream.data_dir={folder}",
        "stream.max_length=24",
        "stream.tokenizer_vocab_size=400",
    ]


def test_a_long_context_is_read_in_windows(tmp_path: Path) -> None:
    files = long_contexts(tmp_path / "data")
    config = configuration(*files, "stream.stride=6", "backbone=transformer_text", "strategy=finetuning")
    stream: Any = build.build_stream(config, None)
    data = stream[0].train
    columns = data.columns
    shown = columns["answerable"].bool()
    shown[:, 0] = False
    for question in columns["question"].unique().tolist():
        own = (columns["question"] == question).nonzero()[:, 0]
        text, references = stream.texts[columns["index"][own[0]]]
        begun, found = text.index("\n") + 1, []
        read: set[int] = set()
        before: set[tuple[int, int]] = set()
        for k, row in enumerate(own.tolist()):
            places = stream.offsets[columns["index"][row]]
            tokens = places[shown[row]].tolist()
            assert k == 0 or len({(a, b) for a, b in tokens} & before) == 6  # shared with the window before
            before = {(a, b) for a, b in tokens}
            read |= {i for a, b in tokens for i in range(a, b)}
            start, end = columns["labels"][row].tolist()
            if (start, end) != (0, 0):
                found.append(text[places[start, 0] : places[end, 1]].strip())
        assert {i for i in range(begun, len(text)) if not text[i].isspace()} <= read  # nothing is cut
        assert found == [references[0]] * len(found) and (found or not references[0])
    assert any("contexts are read in several windows of stream.max_length=24 tokens" in note for note in stream.notes)
    assert not any("cut" in note for note in stream.notes)


@pytest.mark.parametrize(("stride", "right"), [("null", False), ("6", True)])
def test_what_stands_behind_the_first_tokens_is_found_with_windows_only(
    stride: str, right: bool, tmp_path: Path
) -> None:
    files = [*long_contexts(tmp_path / "data"), f"stream.stride={stride}", "backbone=transformer_text"]
    made = composed_experiment(
        tmp_path / "run", *files, "backbone.size=16", "strategy=replay", "strategy.replay.policy=reservoir"
    )
    results = made.run()
    assert [len({row["source"] for row in rows}) for rows in results.samples] == [3, 3]
    loaded = load(tmp_path / "run" / "model")
    e = made.stream[0]
    rows = answers(made.learner, made.stream, e.test, 3)
    pairs = [tuple(row[0].split("\n", 1)) for row in rows]
    assert len(set(pairs)) == len(pairs)
    assert [answer.answer for answer in loaded.predict(pairs)] == [row[2] for row in rows]
    made.learner.forward = perfect  # type: ignore[method-assign]
    assert (score(made.learner, made.stream, e, e.test, 3)["exact_match"] == 1.0) == right  # type: ignore[index]


def test_a_window_must_bring_something_new(tmp_path: Path) -> None:
    config = configuration(
        *long_contexts(tmp_path / "data"), "stream.stride=10", "backbone=transformer_text", "strategy=finetuning"
    )
    with pytest.raises(
        ClplatformError, match=r"stream.stride=10: a window of stream.max_length=24 tokens has \d+ for its part"
    ):
        build.build_stream(config, None)


def test_no_answer_is_where_the_question_or_padding_is(tmp_path: Path) -> None:
    made = experiment("question_answering", tmp_path, "strategy=finetuning")
    batch = made.stream[0].train.fetch(torch.arange(6))
    logits = made.learner.eval()(batch).logits
    assert logits.shape == (6, 2, batch["input_ids"].shape[1])
    closed = logits <= MASKED / 2
    assert torch.equal(closed[:, 0], batch["answerable"] == 0) and torch.equal(closed[:, 0], closed[:, 1])
    teacher = made.learner.snapshot()
    assert torch.equal(teacher(batch).logits, logits)
