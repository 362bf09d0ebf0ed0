"""iCaRL: the loss against a hand-written loop, exemplars against the paper's algorithm, means against scikit-learn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import trained
from exemplars import brute_force
from naive import Model, Recorder, run, train
from sklearn.neighbors import NearestCentroid
from strategies import from_page
from torch import Tensor
from world import TinyStream, make_experiment, weights

from clplatform.saved import load
from clplatform.strategy.finetuning import Finetuning
from clplatform.strategy.icarl import ClassMeans, ICaRL
from clplatform.types import Batch, ClplatformError, Experience, ExperienceInfo


def make(**changes: Any) -> ICaRL:
    strategy = from_page("icarl", **changes)
    assert isinstance(strategy, ICaRL)
    return strategy


class Watch(Finetuning):
    """After iCaRL in the chain: the exemplars and the means that each experience leaves."""

    def __init__(self, icarl: ICaRL) -> None:
        self.icarl = icarl
        self.exemplars: list[Batch] = []
        self.means: list[Tensor] = []

    def after_experience(self, learner: Any, experience: Experience) -> None:
        self.exemplars.append(self.icarl.buffer.take(torch.arange(len(self.icarl.buffer))))
        self.means.append(learner.extras["icarl"].means.clone())


def run_watched(folder: Path, icarl: ICaRL, **options: Any) -> tuple[Any, Recorder, Watch]:
    recorder, watch = Recorder(), Watch(icarl)
    experiment = make_experiment(folder, {"recorder": recorder, "icarl": icarl, "watch": watch}, **options)
    experiment.run()
    return experiment, recorder, watch


def model_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("extras")}


# -- the loss -------------------------------------------------------------------------------------------------------------


def written_out(logits: Tensor, labels: Tensor, then: Tensor | None, current: list[int], mistake: str = "") -> Tensor:
    """The cross-entropies of sigmoids one by one: summed over classes, mean over samples."""
    total = logits.new_zeros(())
    for i, y in enumerate(labels.tolist()):
        for k in range(logits.shape[1]):
            g, target = 1 / (1 + (-logits[i, k]).exp()), torch.tensor(float(k == y))
            old = k not in current if mistake != "one class too many" else k not in current[1:]
            if mistake == "labels of exemplars":
                old = old and y in current
            if old and then is not None and mistake != "no distillation":
                target = 1 / (1 + (-then[i, k]).exp())
            total = total - target * g.log() - (1 - target) * (1 - g).log()
    return total / len(labels) / (logits.shape[1] if mistake == "mean over classes" else 1)


def learn(recorder: Recorder, stream: Any, mistake: str = "") -> Model:
    model = Model(model_weights(recorder.before[0]))
    for experience, start, batches in zip(stream, recorder.before, recorder.batches, strict=True):
        model.grow(start)
        teacher = copy.deepcopy(model) if experience.index else None

        def loss(
            model: Model, batch: Batch, logits: Tensor, teacher: Any = teacher, experience: Any = experience
        ) -> Tensor:
            with torch.no_grad():
                then = None if teacher is None else teacher(batch["pixel_values"])
            return written_out(logits, batch["labels"], then, list(experience.classes), mistake)

        train(model, batches, loss)
    return model


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_the_loss_is_the_written_out_one(scenario: str, tmp_path: Path) -> None:
    stream = TinyStream(scenario=scenario)
    experiment, recorder = run(tmp_path, "icarl", make(), stream=stream)
    model, found = learn(recorder, stream), model_weights(weights(experiment.learner))
    for name, expected in model.named().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


MISTAKES = ["no distillation", "mean over classes", "labels of exemplars", "one class too many"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    stream = TinyStream()
    experiment, recorder = run(tmp_path, "icarl", make(), stream=stream)
    model, found = learn(recorder, stream, mistake), model_weights(weights(experiment.learner))
    assert not torch.allclose(found["head.linear.weight"], model.head.weight, rtol=1e-3, atol=1e-3)


def test_the_teacher_is_the_model_of_before_without_dropout(tmp_path: Path) -> None:
    icarl, stream = make(), TinyStream()
    experiment, recorder = run(tmp_path, "icarl", icarl, stream=stream, dropout=0.5)
    learner: Any = experiment.learner.train()
    batch = stream[2].train.fetch(torch.arange(32))
    output = learner(batch)  # with dropout
    then = Model({n: t[:4] if n.startswith("head") else t for n, t in model_weights(recorder.after[1]).items()})
    expected = written_out(output.logits, batch["labels"], then(batch["pixel_values"]), [4, 5])
    torch.testing.assert_close(icarl.task_loss(learner, batch, output), expected, rtol=1e-4, atol=1e-5)


def test_with_task_ids_other_tasks_have_no_part(tmp_path: Path) -> None:
    icarl, stream = make(), TinyStream(scenario="task_incremental")
    experiment, recorder = run(tmp_path, "icarl", icarl, stream=stream)
    learner: Any = experiment.learner.train()
    new = stream[2].train.fetch(torch.arange(5))
    old = stream[0].train.fetch(torch.arange(10, 20))
    new_logits, old_logits = (Model(model_weights(weights(learner)))(b["pixel_values"]) for b in (new, old))
    then = Model(model_weights(recorder.after[1]))(old["pixel_values"])
    both = {name: torch.cat([new[name], old[name]]) for name in new}
    found = icarl.task_loss(learner, both, learner(both))
    of_new = written_out(new_logits[:, 4:], new["labels"] - 4, None, [0, 1])
    of_old = written_out(old_logits[:, :2], old["labels"], then[:, :2], [])
    torch.testing.assert_close(found, (5 * of_new + 10 * of_old) / 15, rtol=1e-4, atol=1e-5)


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, {"icarl": make()}, label_smoothing=0.1)
    with pytest.raises(ClplatformError, match=r"label_smoothing=0.1 .* give label_smoothing=0$"):
        experiment.run()


# -- exemplars ------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_the_new_data_and_all_exemplars(tmp_path: Path) -> None:
    stream, icarl = TinyStream(), make()
    _, recorder, watch = run_watched(tmp_path, icarl, stream=stream)
    for experience, batches in zip(stream, recorder.batches, strict=True):
        exemplars = watch.exemplars[experience.index - 1]["index"].tolist() if experience.index else []
        new = experience.train.columns["index"].tolist()
        per_epoch = -(-(len(new) + len(exemplars)) // 8)
        assert len(batches) == 2 * per_epoch
        for epoch in (batches[:per_epoch], batches[per_epoch:]):
            index, source = (torch.cat([b[name] for b in epoch]) for name in ("index", "source"))
            assert sorted(index.tolist()) == sorted(new + exemplars)
            assert sorted(index[source == 2].tolist()) == sorted(exemplars)
            assert sorted(index[source == 0].tolist()) == sorted(new)


def test_exemplars_are_those_of_the_paper_s_algorithms(tmp_path: Path) -> None:
    """Herding with the features after the experience (unaugmented, no dropout), then the first of each stay."""

    def shift(batch: Batch, generator: torch.Generator) -> Batch:
        return {**batch, "pixel_values": batch["pixel_values"] + 3}

    stream, icarl = TinyStream(), make()
    _, recorder, watch = run_watched(tmp_path, icarl, stream=stream, dropout=0.5, augment=shift)
    order: dict[int, list[int]] = {}
    for experience, after, exemplars in zip(stream, recorder.after, watch.exemplars, strict=True):
        model, batch = Model(model_weights(after)), experience.train.fetch(torch.arange(32))
        for c in experience.classes:
            of_class = batch["labels"] == c
            features = model.features(batch["pixel_values"][of_class]).detach()
            order[c] = [int(batch["index"][of_class][i]) for i in brute_force(features, 20)]
        share = 20 // (2 * experience.index + 2)
        for c, ranked in order.items():
            kept = set(exemplars["index"][exemplars["labels"] == c].tolist())
            assert len(kept) in (share, share + 1)
            assert kept == set(ranked[: len(kept)])
        assert len(exemplars["labels"]) == 20


# -- the nearest mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class_incremental", "domain_incremental"])
def test_predictions_are_scikit_learn_s(scenario: str, tmp_path: Path) -> None:
    """Nearest centroid of the exemplars' normalised features, for every class with the model as it is now."""
    stream, icarl = TinyStream(scenario=scenario, noise=1.5), make()
    experiment, recorder, watch = run_watched(tmp_path, icarl, stream=stream)
    model, exemplars = Model(model_weights(recorder.after[-1])), watch.exemplars[-1]

    @torch.no_grad()
    def normalised(x: Tensor) -> Any:
        features = model.features(x)
        return (features / features.norm(dim=1, keepdim=True)).double().numpy()

    theirs = NearestCentroid().fit(normalised(exemplars["pixel_values"]), exemplars["labels"].numpy())
    length = (theirs.centroids_**2).sum(1, keepdims=True) ** 0.5
    assert length.max() < 0.999
    theirs.centroids_ /= length  # the paper's means are normalised again
    learner: Any = experiment.learner.eval()
    wrong_by_head = 0
    for experience in stream:
        batch = experience.test.fetch(torch.arange(16))
        with torch.no_grad():
            output = learner(batch)
        x = normalised(batch["pixel_values"])
        assert output.logits.argmax(1).tolist() == theirs.predict(x).tolist()
        squared = ((torch.from_numpy(x)[:, None] - torch.from_numpy(theirs.centroids_)[None]) ** 2).sum(2)
        torch.testing.assert_close(output.logits.double(), -squared, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.features, model.features(batch["pixel_values"]))
        wrong_by_head += int((model(batch["pixel_values"]).argmax(1) != output.logits.argmax(1)).sum())
    assert wrong_by_head > 0  # the head says something else


def test_means_are_taken_anew_after_each_experience(tmp_path: Path) -> None:
    _, recorder, watch = run_watched(tmp_path, make(), dropout=0.5)
    for after, exemplars, means in zip(recorder.after, watch.exemplars, watch.means, strict=True):
        features = Model(model_weights(after)).features(exemplars["pixel_values"])
        unit = features / features.norm(dim=1, keepdim=True)
        for c, mean in enumerate(means):
            expected = unit[exemplars["labels"] == c].mean(0)
            torch.testing.assert_close(mean, expected / expected.norm())
    assert not torch.allclose(watch.means[1][:2], watch.means[0], atol=1e-3)


def test_with_task_ids_the_nearest_of_a_sample_s_own_task(tmp_path: Path) -> None:
    stream = TinyStream(scenario="task_incremental")
    experiment = make_experiment(tmp_path, {"icarl": make()}, stream=stream)
    experiment.run()
    batch = stream[1].test.fetch(torch.arange(16))
    logits = experiment.learner.eval()(batch).logits
    assert (logits[:, [0, 1, 4, 5]] == -1e4).all()
    assert (logits[:, [2, 3]] > -4.01).all()


def test_before_there_are_means_the_head_decides(tmp_path: Path) -> None:
    """Untrained, and in a validation in the middle of an experience."""
    stream, icarl = TinyStream(), make()
    experiment = make_experiment(tmp_path, {"icarl": icarl}, stream=stream)
    learner: Any = experiment.learner
    experiment.run()
    batch = stream[0].test.fetch(torch.arange(16))
    nearest = learner.eval()(batch).logits
    assert torch.equal(learner(batch).logits, nearest)
    icarl.before_experience(learner, stream[2])
    head = Model(model_weights(weights(learner)))(batch["pixel_values"])
    torch.testing.assert_close(learner(batch).logits, head)
    assert not torch.allclose(nearest, head, atol=0.1)


def test_a_class_without_exemplars_is_not_predicted() -> None:
    means = ClassMeans(4)
    means.grow(ExperienceInfo(0, "e1", 0, (0, 1), 2))
    means.update(torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0]]), torch.tensor([1, 1]))
    logits = means(torch.tensor([[0.0, 0, 0, 1]]))
    assert logits[0, 0] == -1e4
    assert logits[0, 1] == pytest.approx(-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_and_the_saved_model(precision: str, tmp_path: Path) -> None:
    model = ["backbone=mlp", "backbone.hidden=[50]", "optimizer.lr=0.003", f"trainer.precision={precision}"]
    chosen = ["stream.n_experiences=2", "strategy=icarl", "strategy.icarl.capacity=40"]
    run = trained(tmp_path, *model, *chosen, "trainer.limit_train_batches=1.0", "trainer.max_epochs=2")
    assert all(value > 0.7 for value in run.results.matrix[-1])  # of ten digits
    loaded: Any = load(tmp_path).learner.extras["icarl"]  # which is float32
    means: Any = run.learner.extras["icarl"].means
    assert loaded.known.all()
    assert torch.equal(loaded.means, means.float())


def test_early_stopping_and_learning(tmp_path: Path) -> None:
    results = make_experiment(tmp_path, {"icarl": make()}, fitter={"patience": 1}, trainer={"max_epochs": 6}).run()
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}).run()
    assert results.metrics["average_forgetting"] < 0.15 < plain.metrics["average_forgetting"]  # type: ignore[operator]
