"""FGM against the closed form of a linear model, in a hand-written loop, and against a BERT's samples taken one by one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import Bag, Written, close, learn, replay, run
from composed import configuration
from pytorch_lightning.plugins import MixedPrecision
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment, tiny_bert
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, make_learner, tiny_vit, weights

from clplatform import build
from clplatform.fitting import Fitter
from clplatform.module.perturbation import COLUMN
from clplatform.strategy.base import Chain, Strategy
from clplatform.strategy.fgm import FGM
from clplatform.types import Batch, ClplatformError

EPSILON, STRENGTH = 1.5, 0.7


def make(**changes: Any) -> FGM:
    strategy = from_page("fgm", **{"epsilon": EPSILON, "relative": False, "strength": STRENGTH, **changes})
    assert isinstance(strategy, FGM)
    return strategy


def by_hand(model: Written, batch: Batch, mistake: str = "") -> Tensor:
    """ε Wᵀ (softmax(z) − y) / (‖Wᵀ (softmax(z) − y)‖ √l) for each of a text's l tokens."""
    g = model.uphill(batch)
    if mistake == "norm of the batch":
        return EPSILON * g / g.norm()
    if mistake == "norm of each token":
        return EPSILON * g / g.norm(dim=2, keepdim=True).clamp_min(1e-12)
    if mistake == "the sign":
        return EPSILON * g.sign()
    return EPSILON * g / g.flatten(1).norm(dim=1)[:, None, None]


@pytest.mark.parametrize("with_replay", [False, True])
def test_equals_a_hand_written_loop_with_the_closed_form(with_replay: bool, tmp_path: Path) -> None:
    """Beside replay all rows are perturbed, those of the memory too."""
    chain = [replay()] if with_replay else []
    experiment, recorder = run(tmp_path, *chain, ("fgm", make()))
    assert len(recorder.batches[1][0]["labels"]) == (16 if with_replay else 8)
    close(learn(recorder, by_hand, STRENGTH), experiment.learner)


def relative(model: Written, batch: Batch, mistake: str = "") -> Tensor:
    """The same, of a length that is in units of the root mean square of the numbers of a text's tokens."""
    r = by_hand(model, batch)
    for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        numbers = model.E.detach()[ids if mistake == "with padding" else ids[mask.bool()]].flatten()
        r[i] *= (sum(x**2 for x in numbers.tolist()) / len(numbers)) ** 0.5
    return r


def test_a_relative_length_is_in_units_of_the_texts_own_vectors(tmp_path: Path) -> None:
    backbone = Bag()
    with torch.no_grad():  # words of very different lengths
        backbone.embeddings["token"].weight *= torch.linspace(0.2, 3, 49)[:, None]
    experiment, recorder = run(tmp_path, replay(), ("fgm", make(relative=True)), backbone=backbone)
    close(learn(recorder, relative, STRENGTH), experiment.learner)
    for mistaken in (by_hand, partial(relative, mistake="with padding")):
        with pytest.raises(AssertionError, match="not close"):
            close(learn(recorder, mistaken, STRENGTH), experiment.learner)


@pytest.mark.parametrize("mistake", ["norm of the batch", "norm of each token", "the sign"])
def test_usual_mistakes_would_be_seen(mistake: str, tmp_path: Path) -> None:
    experiment, recorder = run(tmp_path, ("fgm", make()))
    with pytest.raises(AssertionError, match="not close"):
        close(learn(recorder, partial(by_hand, mistake=mistake), STRENGTH), experiment.learner)


def test_equals_a_berts_samples_taken_one_by_one(tmp_path: Path) -> None:
    """Each text alone and without padding, through Hugging Face's own door for vectors."""
    fgm, stream = make(), TinyTextStream(2)
    experiment = make_text_experiment(tmp_path, {"fgm": fgm}, stream=stream)
    experiment.run()
    learner: Any = experiment.learner
    batch = stream[0].train.fetch(torch.arange(6))
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    model, head, losses = learner.backbone.model, learner.head.linear, []
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        vectors = model.embeddings.word_embeddings(ids[mask.bool()])[None].detach()

        def loss(x: Tensor, label: Tensor = label) -> Tensor:
            return F.cross_entropy(head(model(inputs_embeds=x).last_hidden_state.mean(1)), label[None])

        x = vectors.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x)
        losses.append(loss(vectors + EPSILON * g / g.norm()))
    with torch.no_grad():
        output = learner(batch)
    found = fgm.loss(learner, batch, output)["fgm"]
    torch.testing.assert_close(found, STRENGTH * torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    assert found > STRENGTH * learner.task_loss(batch, output) * 1.01


def test_it_is_the_gradient_of_both_losses(tmp_path: Path) -> None:
    """r is a constant: nothing flows through how it was found. And `.grad` is left to Lightning."""
    learner: Any = run(tmp_path, ("fgm", make()))[0].learner
    learner.zero_grad()
    batch = TinyTextStream(2)[1].train.fetch(torch.arange(8))
    model, parameters = (
        Written(weights(learner)),
        [learner.backbone.embeddings["token"].weight, learner.head.linear.weight],
    )
    term = learner.chain.strategies["fgm"].loss(learner, batch, learner(batch))["fgm"]
    assert all(p.grad is None for p in learner.parameters())
    found = torch.autograd.grad(term, parameters)
    expected = torch.autograd.grad(
        STRENGTH * F.cross_entropy(model.logits(batch, by_hand(model, batch)), batch["labels"]), [model.E, model.W]
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_a_perturbation_it_is_training_on_the_loss_twice(tmp_path: Path) -> None:
    """ε = 0 and λ = 1: as with the loss doubled, which for SGD is the learning rate doubled; so in a Transformer."""
    rate = partial(torch.optim.SGD, momentum=0.9)
    stream = TinyTextStream(2)
    ours = make_text_experiment(
        tmp_path / "a", {"fgm": make(epsilon=0.0, strength=1.0)}, stream=stream, optimizer=partial(rate, lr=0.05)
    )
    plain = make_text_experiment(
        tmp_path / "b", {"finetuning": from_page("finetuning")}, stream=stream, optimizer=partial(rate, lr=0.1)
    )
    ours.run()
    plain.run()
    for name, weight in weights(plain.learner).items():
        torch.testing.assert_close(weights(ours.learner)[name], weight, rtol=1e-3, atol=1e-5)


def test_the_loss_at_the_perturbed_vectors_is_higher(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    fgm = make(strength=1.0, epsilon=0.5)
    experiment = make_text_experiment(tmp_path, {"fgm": fgm}, stream=TinyTextStream(2))
    experiment.fitter.after_batch = lambda trainer, learner, i: seen.append(
        (float(learner.last_terms["task"]), float(learner.last_terms["fgm"]))
    )
    experiment.run()
    assert len(seen) == 16 and all(after > before for before, after in seen)


def test_images_are_perturbed_as_patches(tmp_path: Path) -> None:
    """Against Hugging Face's patch embedding, replaced by one that returns its output and the perturbation."""
    fgm, stream = make(epsilon=2.0), TinyStream(2)
    experiment = make_experiment(tmp_path, {"fgm": fgm}, stream=stream, backbone=tiny_vit())
    experiment.run()
    learner: Any = experiment.learner
    batch = stream[0].train.fetch(torch.arange(5))
    patches = learner.backbone.model.embeddings.patch_embeddings
    original, expected = patches.forward, []
    for i in range(5):
        one = {name: column[i : i + 1] for name, column in batch.items()}
        r = torch.zeros(1, 4, 16, requires_grad=True)
        patches.forward = lambda *a, r=r, **k: original(*a, **k) + r
        (g,) = torch.autograd.grad(learner.task_loss(one, learner(one)), r)
        patches.forward = lambda *a, g=g, **k: original(*a, **k) + 2.0 * g / g.norm()
        expected.append(learner.task_loss(one, learner(one)))
    patches.forward = original
    found = fgm.loss(learner, batch, learner(batch))["fgm"]
    torch.testing.assert_close(found, STRENGTH * torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_the_loss_that_another_strategy_puts_in_place_is_the_one_that_is_perturbed(tmp_path: Path) -> None:
    """ER-ACE's is among the current classes only: so is the adversarial one, whose gradient of old classes is zero."""
    chain = {"fgm": make(), "er_ace": from_page("er_ace", capacity=20)}
    experiment = make_experiment(tmp_path, chain, stream=TinyTextStream(2), backbone=Bag())
    experiment.run()
    learner: Any = experiment.learner
    batch = TinyTextStream(2)[1].train.fetch(torch.arange(0, 32, 4))
    term = chain["fgm"].loss(learner, batch, learner(batch))["fgm"]
    (g,) = torch.autograd.grad(term, learner.head.linear.weight)
    assert g[2:].abs().sum() > 0 and g[:2].abs().sum() == 0


@pytest.mark.parametrize("order", [("fgm", "podnet"), ("podnet", "fgm")])
def test_what_others_have_noted_of_the_training_pass_stays(order: tuple[str, str], tmp_path: Path) -> None:
    """PODNet keeps hidden states in `forward` for its loss: they must not be those of perturbed texts."""
    chain = {name: make(epsilon=5.0) if name == "fgm" else from_page(name) for name in order}
    terms: list[float] = []
    adamw = partial(torch.optim.AdamW, lr=0.01)
    experiment = make_text_experiment(tmp_path, chain, stream=TinyTextStream(2), optimizer=adamw)
    experiment.fitter.after_batch = lambda trainer, learner, i: terms.append(
        float(learner.last_terms.get("podnet_spatial", 0.0))
    )
    experiment.run()
    # Student and teacher are equal at the first step of the second experience.
    assert terms[8] == pytest.approx(0, abs=1e-6) and terms[9] > 1e-6


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_a_backbone_without_token_vectors_is_refused_before_anything_is_built() -> None:
    config = configuration("strategy=fgm", "backbone=mlp")
    stream = build.build_stream(config)
    with pytest.raises(ClplatformError, match="strategy=fgm needs a Transformer, but backbone=mlp is none"):
        build.check_needs(build.build_strategies(config), stream.info, config)
    learner = make_learner(TinyStream(), {"fgm": make()})
    with pytest.raises(ClplatformError, match="strategy=fgm perturbs the vectors of tokens, and this backbone has no"):
        learner.build(TinyStream()[0].info)


@pytest.mark.parametrize("name", ["linear_probe", "seq_star"])
def test_features_that_are_computed_once_are_refused(name: str) -> None:
    stream = TinyTextStream(2)
    learner = make_learner(stream, {"fgm": make(), name: from_page(name)}, backbone=tiny_bert())
    with pytest.raises(ClplatformError, match=rf"strategy=\[fgm,{name}\] cannot be combined: {name} computes features"):
        learner.build(stream[0].info)


def test_a_chain_without_gradients_or_steps_of_its_own_is_refused() -> None:
    for name in ("ncm", "avalanche"):
        with pytest.raises(ValueError, match="cannot be combined"):
            Chain({"fgm": make(), name: from_page(name)})


def test_a_frozen_backbone_is_perturbed_all_the_same(tmp_path: Path) -> None:
    bert = tiny_bert().requires_grad_(False)
    experiment = make_text_experiment(tmp_path, {"fgm": make()}, stream=TinyTextStream(2))
    experiment.learner.backbone = bert
    experiment.run()
    assert float(experiment.learner.last_terms["fgm"]) > STRENGTH * float(experiment.learner.last_terms["task"])


def test_a_stage_of_other_parts_than_the_backbone_has_no_such_term(tmp_path: Path) -> None:
    """BiC's second stage trains its correction on features that it has stored."""
    seen: dict[str, bool] = {}
    chain = {"bic": from_page("bic", capacity=20, epochs=2), "fgm": make()}
    experiment = make_text_experiment(tmp_path, chain, stream=TinyTextStream(2))
    experiment.fitter.after_batch = lambda trainer, learner, i: seen.__setitem__(
        learner.stage.name, "fgm" in learner.last_terms
    )
    experiment.run()
    assert len(seen) == 2 and sorted(seen.values()) == [False, True]
    assert seen["main"]


@pytest.mark.parametrize("scaled", [False, True])
def test_mixed_precision(scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 as it is; with a scaled loss, as float16 has it, directions are found in float32: seen by what a pass is in."""
    kinds: list[torch.dtype] = []
    trainer_of, scaler = Fitter.make_trainer, torch.amp.GradScaler("cpu", init_scale=1024.0)

    def make_trainer(self: Fitter, *args: Any) -> Any:
        trainer = trainer_of(self, *args)
        if scaled:
            trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
            trainer.strategy.precision_plugin.scaler = scaler
        return trainer

    class Spy(Strategy):
        family = "observer"

        def forward(self, learner: Any, batch: Batch, run: Any) -> Any:
            output = run(batch)
            if COLUMN in batch:
                kinds.append(output.logits.dtype)
            return output

    monkeypatch.setattr(Fitter, "make_trainer", make_trainer)
    experiment = make_text_experiment(
        tmp_path, {"fgm": make(), "spy": Spy()}, stream=TinyTextStream(2), trainer={"precision": "bf16-mixed"}
    )
    experiment.run()
    learner = experiment.learner
    assert learner.last_terms["fgm"] > STRENGTH * learner.last_terms["task"]
    assert set(kinds[::2]) == {torch.float32 if scaled else torch.bfloat16}  # of directions
    assert set(kinds[1::2]) == {torch.bfloat16}  # of what is trained on
