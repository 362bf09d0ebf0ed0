"""One stage of training: what the settings of the trainer, the loss and the optimizer do, against Lightning and by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from encoders import config, image_encoder
from naive import Recorder
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyStream, make_experiment, make_learner, same, weights

from clplatform.data import Loader
from clplatform.evaluate import accuracy
from clplatform.fitting import Fitter, n_steps, trainable
from clplatform.head.cosine import CosineHead
from clplatform.schedule import schedule
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import MASKED, Output, Stage

CPU = {"max_epochs": 2, "accelerator": "cpu", "devices": 1}


def fit(folder: Path, stage: Stage | None = None, *, stream: Any = None, fitter: Any = None, **options: Any) -> Any:
    """A learner that has been fitted to the first experience."""
    stream = stream or TinyStream(1)
    learner = make_learner(stream, {"finetuning": Finetuning()}, **options)
    learner.build(stream[0].info)
    settings = {"trainer": CPU, "batch_size": 8, "eval_batch_size": 32, **(fitter or {})}
    Fitter(**settings).fit(
        learner, stream[0], stage or Stage(), stream[0].train, order_seed=3, step_path=folder / "step.ckpt"
    )
    return learner


# -- early stopping -----------------------------------------------------------------------------------------------------


class Epochs(Finetuning):
    """Writes down weights and validation accuracy after every epoch."""

    def __init__(self) -> None:
        self.found: list[tuple[float | None, dict[str, Tensor]]] = []

    def after_step(self, learner: Any) -> None:
        if learner.steps % 4 == 0:
            copy = make_learner(learner.experience_stream, {}).eval()
            copy.build(learner.experience_stream[0].info)
            copy.load_state_dict(weights(learner))
            self.found.append((accuracy(copy, learner.experience_stream[0].validation, 3), weights(learner)))


@pytest.mark.parametrize(("patience", "max_epochs"), [(2, 30), (4, 30), (30, 6)])
def test_early_stopping_keeps_the_best_weights(patience: int, max_epochs: int, tmp_path: Path) -> None:
    """Of the first best epoch, whether patience or the epochs ran out."""
    stream, watch = TinyStream(1, noise=3.0), Epochs()
    experiment = make_experiment(
        tmp_path, {"watch": watch}, stream=stream, trainer={"max_epochs": max_epochs}, fitter={"patience": patience},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
    )  # fmt: skip
    experiment.learner.experience_stream = stream
    results = experiment.run()
    scores = [score for score, _ in watch.found]
    best = scores.index(max(scores))  # type: ignore[type-var]
    assert len(scores) == min(best + patience + 1, max_epochs)
    assert best + 1 < len(scores)  # the last epoch is not the best
    assert same(weights(experiment.learner), watch.found[best][1])
    assert results.validation_matrix[1][0] == pytest.approx(scores[best])


def test_without_patience_or_without_validation_every_epoch_is_run(tmp_path: Path) -> None:
    stream = TinyStream(1)
    assert fit(tmp_path, stream=stream).steps == 8
    stream.experiences[0] = replace(stream[0], validation=None)
    assert fit(tmp_path, stream=stream, fitter={"patience": 1}).steps == 8


# -- steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_epochs": 3},
        {"accumulate_grad_batches": 3},
        {"accumulate_grad_batches": 9},
        {"max_steps": 5},
        {"max_steps": 500},
        {"limit_train_batches": 3},
        {"limit_train_batches": 30},
        {"limit_train_batches": 0.55},
        {"limit_train_batches": 1.0},
        {"limit_train_batches": 3, "accumulate_grad_batches": 2},
        {"max_steps": 2, "accumulate_grad_batches": 2},
        {"overfit_batches": 2},
        {"fast_dev_run": True},
    ],
)
def test_the_number_of_steps_is_what_lightning_says_and_does(settings: dict[str, Any], tmp_path: Path) -> None:
    stream, said = TinyStream(1), []
    fitter = Fitter(trainer={**CPU, **settings}, batch_size=8, eval_batch_size=32)

    def ask(optimizer: Any, n: int) -> None:
        said.append((n, learner.trainer.estimated_stepping_batches))

    learner = make_learner(stream, {"finetuning": Finetuning()}, schedule=ask)
    learner.build(stream[0].info)
    fitter.fit(learner, stream[0], Stage(), stream[0].train, order_seed=0, step_path=tmp_path / "step.ckpt")
    assert said == [(learner.steps, learner.steps)]
    assert n_steps(fitter.make_trainer(), len(Loader(stream[0].train, 8))) == learner.steps
    assert learner.progress == 1.0


def test_a_stage_has_its_own_epochs(tmp_path: Path) -> None:
    assert fit(tmp_path, Stage(max_epochs=5)).steps == 20
    learner = fit(tmp_path, Stage(max_epochs=0), schedule=partial(schedule, kind="linear", warmup=0.5))
    assert learner.steps == 0
    assert Fitter(trainer=CPU, batch_size=1, eval_batch_size=1).epochs(Stage()) == 2


# -- gradients ----------------------------------------------------------------------------------------------------------


def written_out(
    folder: Path, *, accumulate: int = 1, clip: float | None = None, algorithm: str = "norm"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after an experience of the platform, and of a hand-written loop over the batches that it saw."""
    recorder = Recorder()
    trainer = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "gradient_clip_algorithm": algorithm}
    experiment = make_experiment(
        folder, {"recorder": recorder}, stream=TinyStream(1), trainer=trainer,
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )  # fmt: skip
    experiment.run()
    w = {n: t.clone().requires_grad_() for n, t in recorder.before[0].items()}
    batches = recorder.batches[0]
    for start in range(0, len(batches), accumulate):
        for batch in batches[start : start + accumulate]:
            features = F.linear(batch["pixel_values"].flatten(1), w["backbone.layer.weight"], w["backbone.layer.bias"])
            logits = F.linear(features.tanh(), w["head.linear.weight"], w["head.linear.bias"])
            (F.cross_entropy(logits, batch["labels"]) / accumulate).backward()
        if clip is not None and algorithm == "norm":
            norm = torch.stack([(t.grad**2).sum() for t in w.values() if t.grad is not None]).sum().sqrt()
            scale = min(1.0, clip / (norm.item() + 1e-6))
        for t in w.values():
            assert t.grad is not None
            gradient = t.grad
            if clip is not None:
                gradient = gradient * scale if algorithm == "norm" else gradient.clamp(-clip, clip)
            with torch.no_grad():
                t -= 0.5 * gradient
            t.grad = None
    return weights(experiment.learner), {n: t.detach() for n, t in w.items()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"clip": 0.3}, {"clip": 0.02, "algorithm": "value"}, {"accumulate": 2}, {"accumulate": 4, "clip": 0.2}],
)
def test_clipping_and_accumulation_are_what_a_loop_would_do(settings: dict[str, Any], tmp_path: Path) -> None:
    found, expected = written_out(tmp_path / "a", **settings)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    if settings:
        assert not same(found, written_out(tmp_path / "b")[0])


def test_only_what_a_stage_trains_changes_and_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    stream = TinyStream(1)
    before = weights(fit(tmp_path, Stage(max_epochs=0), stream=stream))
    after = weights(fit(tmp_path, Stage(trainable="head"), stream=stream))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.linear.weight", "head.linear.bias"}


def test_trainable_puts_back_what_was_trainable_even_at_an_error() -> None:
    module = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    module["a"].weight.requires_grad_(False)
    states: list[dict[str, bool]] = []

    def look() -> None:
        states.append({n: p.requires_grad for n, p in module.named_parameters()})

    def fail() -> None:
        with trainable(module, r"^a\.|b\.bias"):
            look()
            raise RuntimeError("boom")

    look()
    with pytest.raises(RuntimeError, match="boom"):
        fail()
    look()
    with trainable(module, None):
        look()
    assert states[1] == {"a.weight": True, "a.bias": True, "b.weight": False, "b.bias": True}
    assert states[0] == states[2] == states[3]


def test_a_stage_that_trains_everything_leaves_a_frozen_part_alone() -> None:
    backbone = image_encoder(freeze=1)
    fixed = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    with trainable(nn.ModuleDict({"backbone": backbone}), "."):
        assert {n for n, p in backbone.named_parameters() if not p.requires_grad} == fixed


# -- the loss -----------------------------------------------------------------------------------------------------------


def test_label_smoothing_is_pytorch_s() -> None:
    """(1 − ε) CE + ε/K Σ_k −log p_k, for every reduction."""
    learner = make_learner(TinyStream(), {}, label_smoothing=0.2)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    logp = logits.log_softmax(1)
    each = [0.8 * -logp[i, k] + 0.2 * -logp[i].mean() for i, k in enumerate(labels.tolist())]
    for reduction, expected in (("none", torch.stack(each)), ("mean", sum(each) / 6), ("sum", sum(each))):
        found = learner.task_loss({"labels": labels}, Output(logits, logits), reduction)
        torch.testing.assert_close(found, torch.as_tensor(expected))
        assert torch.equal(found, F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.2))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classes_of_other_tasks_take_no_part_in_the_loss(smoothing: float) -> None:
    """With task ids a batch's loss is that of its tasks' classifiers alone."""
    learner = make_learner(TinyStream(scenario="task_incremental"), {}, label_smoothing=smoothing)
    logits = torch.randn(4, 6).requires_grad_()
    tasks, labels = torch.tensor([0, 2, 1, 0]), torch.tensor([0, 5, 2, 1])
    others = torch.arange(6) // 2 != tasks[:, None]
    masked = logits.masked_fill(others, MASKED)
    each = torch.stack(
        [F.cross_entropy(logits[i, 2 * t : 2 * t + 2], labels[i] - 2 * t, label_smoothing=smoothing)
         for i, t in enumerate(tasks.tolist())]
    )  # fmt: skip
    for reduction, expected in (("none", each), ("mean", each.mean()), ("sum", each.sum())):
        found = learner.task_loss({"labels": labels}, Output(masked, masked), reduction)
        torch.testing.assert_close(found, expected)
    (a,), (b,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(a, b)


def test_label_smoothing_is_trained_with(tmp_path: Path) -> None:
    for scenario in ("class_incremental", "task_incremental"):
        stream = TinyStream(scenario=scenario)
        options: Any = {"trainer": {"max_epochs": 40}, "label_smoothing": 0.3}
        experiment = make_experiment(tmp_path / scenario, {"finetuning": Finetuning()}, stream=stream, **options)
        experiment.run()
        batch = stream[2].train.fetch(torch.arange(32))
        n_classes = 6 if scenario == "class_incremental" else 2
        p = experiment.learner.eval()(batch).logits.softmax(1).gather(1, batch["labels"][:, None]).mean().item()
        assert p == pytest.approx(1 - 0.3 + 0.3 / n_classes, abs=0.08)  # what the smoothed labels say


# -- the optimizer ------------------------------------------------------------------------------------------------------


def test_biases_norms_and_scales_do_not_decay() -> None:
    stream = TinyStream(1)
    learner = make_learner(stream, {"finetuning": Finetuning()}, backbone=image_encoder())
    learner.head = CosineHead(feature_size=16, scale=10.0)
    learner.build(stream[0].info)
    names = {id(p): n for n, p in learner.named_parameters()}
    decayed, plain = ([names[id(p)] for p in g["params"]] for g in learner.parameter_groups())
    assert sorted(decayed + plain) == sorted(names.values())
    norms = {n for n, m in learner.named_modules() if isinstance(m, nn.LayerNorm)}
    assert len(norms) == 7
    for name in names.values():
        spared = name.endswith(".bias") or name.rpartition(".")[0] in norms or name == "head.scale"
        assert (name in plain) == spared, name


def test_weight_decay_acts_on_weights_only(tmp_path: Path) -> None:
    """A step with gradients of zero: AdamW's decay is all that is left."""
    stream = TinyStream(1)

    class NoGradient(Finetuning):
        def edit_gradients(self, learner: Any) -> None:
            for p in learner.parameters():
                p.grad.zero_()

    optimizer = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    experiment = make_experiment(
        tmp_path, {"none": NoGradient()}, stream=stream, optimizer=optimizer, trainer={"max_epochs": 1}
    )
    experiment.learner.build(stream[0].info)
    before = weights(experiment.learner)
    experiment.run()
    for name, tensor in weights(experiment.learner).items():
        expected = before[name] * (1 - 0.1 * 0.5) ** 4 if tensor.ndim == 2 else before[name]
        torch.testing.assert_close(tensor, expected)


# -- precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train_and_evaluate(precision: str, tmp_path: Path) -> None:
    """A Transformer whose images are resized, since half precision cannot do everything."""
    stream = TinyStream(2)
    settings = config("vit", image_size=[4, 6], patch_size=[2, 3], hidden_dropout_prob=0.1)
    options: Any = {
        "stream": stream, "optimizer": partial(torch.optim.AdamW, lr=0.01),
        "backbone": image_encoder(input=stream.info.input, config=settings),
    }  # fmt: skip
    experiment = make_experiment(
        tmp_path, {"finetuning": Finetuning()}, trainer={"precision": precision, "max_epochs": 6}, **options
    )
    results = experiment.run()
    assert results.matrix[2][1] > 0.8  # type: ignore[operator]
    kind = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {p.dtype for p in experiment.learner.parameters()} == {kind}


def test_mixed_precision_computes_in_half_and_keeps_weights_whole(tmp_path: Path) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Watch(Finetuning):
        def after_batch(self, learner: Any, batch: Any, output: Output) -> None:
            seen.append((output.logits.dtype, learner.last_terms["loss"].dtype))

    experiment = make_experiment(tmp_path, {"watch": Watch()}, trainer={"precision": "bf16-mixed"})
    results = experiment.run()
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert all(p.dtype == torch.float32 for p in experiment.learner.parameters())
    whole = make_experiment(tmp_path / "whole", {"finetuning": Finetuning()}).run()
    for a, b in zip(results.matrix[-1], whole.matrix[-1], strict=True):
        assert a == pytest.approx(b, abs=0.2)


# -- around a fit -------------------------------------------------------------------------------------------------------


def test_a_fit_says_nothing_of_what_is_meant_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No remark on missing loaders, few workers or available devices (warnings are errors here)."""
    fit(tmp_path)
    out, err = capfd.readouterr()
    assert not re.search(r"\S", out + err)


def test_callbacks_and_after_batch_are_called(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Mine(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            calls.append("epoch")

    def after_batch(trainer: pl.Trainer, learner: Any, batch_idx: int) -> None:
        calls.append(batch_idx)

    fit(tmp_path, fitter={"callbacks": [Mine()], "after_batch": after_batch})
    assert calls == [0, 1, 2, 3, "epoch"] * 2
