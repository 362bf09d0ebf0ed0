"""One row of the matrix and the confusion matrix, against scikit-learn and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from text_world import make_text_experiment
from torch import nn
from world import TinyStream, make_experiment, make_learner, same, weights

from clplatform.data import TensorData, by_length
from clplatform.evaluate import accuracy, confusion, evaluate_row, has_meaning, macro_f1, only, predict
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import Batch


def learner_of(stream: Any, *, seen: int = 3, **options: Any) -> Any:
    learner = make_learner(stream, {"finetuning": Finetuning()}, **options)
    for experience in list(stream)[:seen]:
        learner.build(experience.info)
    return learner


def hard() -> TinyStream:
    """Classes that an untrained model mixes up."""
    return TinyStream(noise=2.0)


# -- predictions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 48, 1000])
def test_every_sample_is_predicted_in_its_place_and_counts_the_same(batch_size: int) -> None:
    """A last batch that is smaller has no larger say."""
    stream = hard()
    learner, data = learner_of(stream), stream[0].test + stream[1].test + stream[2].test
    batch = data.fetch(torch.arange(48))
    expected = learner.eval()(batch).logits.argmax(1)
    assert torch.equal(predict(learner, data, batch_size), expected)
    found = accuracy(learner, data, batch_size)
    assert found == pytest.approx(accuracy_score(batch["labels"], expected))
    assert 0 < found < 1


class Answers(nn.Module):
    """Knows the class of samples with an even number, and takes the next one for the others."""

    def forward(self, batch: Batch) -> torch.Tensor:
        return nn.functional.one_hot((batch["labels"] + batch["index"] % 2) % 3, 3).float()


def test_accuracy_is_the_share_of_samples_not_the_mean_of_batches() -> None:
    learner = learner_of(TinyStream(), backbone=Answers())
    learner.head.linear = nn.Identity()
    index = torch.tensor([0, 2, 4, 6, 1])  # the last batch has one sample, and it is wrong
    labels = torch.tensor([0, 1, 2, 0, 1])
    data = TensorData(
        {"pixel_values": torch.zeros(5, 1, 1, 1), "labels": labels, "task_labels": labels * 0, "index": index}
    )
    assert accuracy(learner, data, 4) == pytest.approx(4 / 5)
    assert accuracy(learner, data.select(torch.tensor([], dtype=torch.int64)), 4) is None
    assert predict(learner, data.select(torch.tensor([], dtype=torch.int64)), 4).shape == (0,)


@pytest.mark.parametrize("classes", [2, 7])
def test_macro_f1_is_scikit_learn_s(classes: int) -> None:
    """Over the classes that are there: some are never predicted, and some that are not there are."""
    g = torch.Generator().manual_seed(classes)
    labels = torch.randint(1, classes, (50,), generator=g)
    for found in (torch.randint(0, classes + 2, (50,), generator=g), torch.ones_like(labels), labels):
        expected = f1_score(labels, found, labels=labels.unique(), average="macro", zero_division=0)
        assert macro_f1(found, labels) == pytest.approx(expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_no_trace(training: bool) -> None:
    stream = hard()
    learner = learner_of(stream, dropout=0.5).train(training)
    before, state = weights(learner), torch.get_rng_state()
    predicted = predict(learner, stream[0].test, 5)
    assert learner.training == learner.backbone.dropout.training == training
    assert same(before, weights(learner))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(predicted, predict(learner, stream[0].test, 16))  # without dropout
    assert not predicted.is_inference()


# -- the matrix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "seen", "expected"),
    [
        ("class_incremental", 1, [True, False, False]),
        ("class_incremental", 2, [True, True, False]),
        ("class_incremental", 3, [True, True, True]),
        ("task_incremental", 1, [True, False, False]),
        ("task_incremental", 2, [True, True, False]),
        ("domain_incremental", 1, [True, True, True]),
    ],
)
def test_what_the_model_has_no_classes_for_is_none(scenario: str, seen: int, expected: list[bool]) -> None:
    stream = TinyStream(scenario=scenario)
    learner = learner_of(stream, seen=seen)
    row = only(evaluate_row(learner, stream, "test", 16), "accuracy")
    assert [value is not None for value in row] == expected
    for value, experience in zip(row, stream, strict=True):
        assert value is None or value == accuracy(learner, experience.test, 3)


def test_a_task_that_comes_back_with_new_classes_has_no_meaning_before() -> None:
    """Another task has brought those classes, but this one has no classifier for them yet."""
    stream = TinyStream(scenario="task_incremental")
    stream.experiences[2] = replace(stream[2], task_label=0, classes=(2, 3), n_seen_classes=4)
    learner = learner_of(stream, seen=2)
    assert [has_meaning(learner, e) for e in stream] == [True, True, False]
    learner.build(stream[2].info)
    assert has_meaning(learner, stream[2])


def test_task_labels_that_nobody_may_use_hide_nothing() -> None:
    stream = TinyStream(scenario="domain_incremental")
    stream.experiences = [replace(e, task_label=e.index) for e in stream]
    assert all(has_meaning(learner_of(stream, seen=1), e) for e in stream)


def test_a_stream_that_repeats_classes_has_meaning_as_soon_as_they_are_there() -> None:
    stream = TinyStream()
    stream.experiences[2] = replace(stream[2], classes=(0, 1), n_seen_classes=4)
    assert [has_meaning(learner_of(stream, seen=1), e) for e in stream] == [True, False, True]


def test_without_a_validation_split_its_row_is_none() -> None:
    stream = hard()
    stream.experiences[1] = replace(stream[1], validation=None)
    learner = learner_of(stream)
    row = only(evaluate_row(learner, stream, "validation", 16), "accuracy")
    assert [value is None for value in row] == [False, True, False]
    assert row != only(evaluate_row(learner, stream, "test", 16), "accuracy")


# -- confusion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_confusion_is_scikit_learn_s(scenario: str, tmp_path: Path) -> None:
    stream = TinyStream(scenario=scenario, noise=2.0)
    experiment = make_experiment(tmp_path, {"finetuning": Finetuning()}, stream=stream)
    results = experiment.run()
    k = experiment.learner.n_classes
    true = torch.cat([e.test.labels for e in stream])
    predicted = torch.cat([predict(experiment.learner, e.test, 7) for e in stream])
    expected = confusion_matrix(true, predicted, labels=range(k))
    assert results.confusion == expected.tolist()
    assert confusion(experiment.learner, stream, 5) == expected.tolist()
    assert (expected > 0).sum() > k  # off the diagonal too
    shares = [value for value in results.matrix[-1] if value is not None]
    assert expected.trace() / expected.sum() == pytest.approx(sum(shares) / 3)


def test_confusion_counts_what_has_meaning_only() -> None:
    stream = hard()
    counts = torch.tensor(confusion(learner_of(stream, seen=2), stream, 16))
    assert counts.shape == (4, 4)
    assert counts.sum(1).tolist() == [8] * 4


def test_texts_are_predicted_by_length_and_answered_in_their_order(tmp_path: Path) -> None:
    """Batches of texts of like length hold little padding; nobody sees that they were sorted."""
    experiment = make_text_experiment(tmp_path, {"finetuning": Finetuning()})
    learner, data = experiment.learner, experiment.stream[0].train
    learner.build(experiment.stream[0].info)
    lengths = data.column("attention_mask").sum(1)
    assert (lengths.diff() < 0).any()
    singly = [learner.eval()(data.fetch(torch.tensor([i]))) for i in range(len(data))]
    torch.testing.assert_close(learner.features(data), torch.cat([one.features for one in singly]).detach())
    assert torch.equal(predict(learner, data, 5), torch.cat([one.logits.argmax(1) for one in singly]))
    ordered, back = by_length(data)
    assert torch.equal(ordered.labels[back], data.labels)
    assert (ordered.fetch(torch.arange(len(data)))["attention_mask"].sum(1).diff() >= 0).all()
