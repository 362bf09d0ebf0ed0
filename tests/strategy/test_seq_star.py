"""SEQ* against a hand-written loop, switch by switch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Recorder
from prototypes import norm_backbone, spoil
from strategies import from_page
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyStream, make_experiment, same, weights

from clplatform.head.cosine import CosineHead
from clplatform.head.multi import MultiHead
from clplatform.strategy.base import Chain, Strategy
from clplatform.strategy.seq_star import SEQStar

ON = {"freeze": True, "freeze_old": True, "preallocate": True}
# Decay and momentum reach rows that have no gradient, if nothing holds them.
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


def make(**changes: Any) -> SEQStar:
    strategy = from_page("seq_star", **changes)
    assert isinstance(strategy, SEQStar)
    return strategy


def run(folder: Path, strategy: SEQStar, *, replay: bool = False, head: Any = None, **options: Any) -> Any:
    """A finished run and its recorder, which sees batches as they are trained on."""
    recorder = Recorder()
    before = {"replay": from_page("replay")} if replay else {}
    strategies: dict[str, Strategy] = {**before, "recorder": recorder, "seq_star": strategy}
    experiment = make_experiment(folder, strategies, **options)
    if head is not None:
        experiment.learner.make_head, experiment.learner.head = head, head()
    experiment.run()
    return experiment, recorder


class Written:
    """The method written out: W, b of the backbone, and V, c of the classifiers of all classes that there will be."""

    def __init__(self, recorder: Recorder, *, lr: float, clip: float | None) -> None:
        self.start, self.lr, self.clip = recorder.before, lr, clip
        self.backbone = [self.start[0][f"backbone.layer.{n}"].clone() for n in ("weight", "bias")]
        self.rows = [torch.zeros(0, 16), torch.zeros(0)]

    def arrive(self, i: int, preallocate: bool) -> None:
        for j, name in enumerate(("weight", "bias")):
            if preallocate and i == 0:
                future = self.start[0][f"extras.seq_star.linear.{name}"][2:]
                self.rows[j] = torch.cat([self.start[0][f"head.linear.{name}"], future])
            elif not preallocate:
                self.rows[j] = torch.cat([self.rows[j], self.start[i][f"head.linear.{name}"][2 * i :]])

    def train(self, batches: Any, first: int, *, whole: bool, old: int) -> None:
        """`old`: so many classes are frozen; `whole`: the backbone is not."""
        fixed = [p[:old] for p in self.rows]
        free = [p[old:].clone().requires_grad_() for p in self.rows]
        backbone = [p.clone().requires_grad_(whole) for p in self.backbone]
        groups = [{"params": free, "lr": self.lr}, *([{"params": backbone}] if whole else [])]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        for batch in batches:
            optimizer.zero_grad()
            features = F.linear(batch["pixel_values"].flatten(1), *backbone).tanh()
            v, c = (torch.cat(pair) for pair in zip(fixed, free, strict=True))
            F.cross_entropy(features @ v.T + c, batch["labels"]).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_([*free, *backbone], self.clip)
            optimizer.step()
        self.rows = [torch.cat([a, b.detach()]) for a, b in zip(fixed, free, strict=True)]
        self.backbone = [p.detach() for p in backbone]


@pytest.mark.parametrize(("replay", "clip"), [(False, None), (True, 0.5)], ids=["", "replay, clipped gradients"])
@pytest.mark.parametrize(
    ("switches", "classifier_lr", "warm_up"),
    [
        (ON, None, 2),
        (ON, 0.03, 1),
        (ON, None, 0),
        ({**ON, "preallocate": False}, None, 2),
        ({**ON, "freeze_old": False}, None, 2),
        ({**ON, "freeze": False}, None, 2),
        (dict.fromkeys(ON, False), None, 2),
    ],
    ids=["all", "its own rate", "no warm-up", "not P", "not O", "not F", "fine-tuning"],
)
def test_equals_a_hand_written_loop(
    switches: dict[str, bool],
    classifier_lr: float | None,
    warm_up: int,
    replay: bool,
    clip: float | None,
    tmp_path: Path,
) -> None:
    """What is frozen does not count in the norm of a gradient either."""
    strategy = make(**switches, classifier_lr=classifier_lr, warm_up=warm_up)
    _, recorder = run(tmp_path, strategy, replay=replay, trainer={"gradient_clip_val": clip})
    model = Written(recorder, lr=classifier_lr or 0.1, clip=clip)
    for i, batches in enumerate(recorder.batches):
        model.arrive(i, switches["preallocate"])
        old = 2 * i if switches["freeze_old"] else 0
        n_warm = 4 * warm_up if i == 0 and switches["freeze"] else 0
        assert len(batches) == 8 + n_warm
        if n_warm:
            model.train(batches[:n_warm], i, whole=True, old=0)
        model.train(batches[n_warm:], i, whole=not switches["freeze"], old=old)
        after = recorder.after[i]
        for j, name in enumerate(("weight", "bias")):
            close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
            close(after[f"head.linear.{name}"], model.rows[j][: 2 * i + 2])
            close(after[f"backbone.layer.{name}"], model.backbone[j])
            if switches["preallocate"]:
                close(after[f"extras.seq_star.linear.{name}"][2 * i + 2 :], model.rows[j][2 * i + 2 :])
    assert ("extras.seq_star.linear.weight" in recorder.before[0]) == switches["preallocate"]


def test_all_switches_off_is_fine_tuning(tmp_path: Path) -> None:
    off, _ = run(tmp_path / "a", make(**dict.fromkeys(ON, False)), dropout=0.3)
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")}, dropout=0.3)
    plain.run()
    assert same(weights(off.learner), weights(plain.learner))


def test_what_is_frozen_stays_to_the_bit(tmp_path: Path) -> None:
    """Against decay, momentum, dropout and batch normalisation."""
    experiment, recorder = run(tmp_path, make(), replay=True, backbone=norm_backbone(), optimizer=ADAMW)
    backbone = [name for name in recorder.before[0] if name.startswith("backbone.")]
    assert len(backbone) == 7
    assert not same(*({n: w[n] for n in backbone} for w in (recorder.before[0], recorder.after[0])))  # the warm-up
    assert same(*({n: w[n] for n in backbone} for w in (recorder.after[0], recorder.after[2])))
    for i in (1, 2):
        for name in ("head.linear.weight", "head.linear.bias"):
            before, after = recorder.after[i - 1][name], recorder.after[i][name]
            assert torch.equal(before, after[: 2 * i])
            assert not (after[2 * i :] == recorder.before[i][name][2 * i :]).any()
    assert not any(p.requires_grad for p in experiment.learner.backbone.parameters())


def test_a_frozen_backbone_is_asked_once_for_each_experience(tmp_path: Path) -> None:
    """In eval mode and without augmentation: nothing of a spoiled sample is left, and yet it is learned."""
    backbone, rows = norm_backbone(), []
    experiment = make_experiment(tmp_path, {"seq_star": make(warm_up=0)}, backbone=backbone, augment=spoil)
    chain = experiment.learner.chain
    start, after = chain.before_experience, chain.after_experience

    def before_experience(learner: Any, experience: Any) -> None:
        backbone.rows.clear()
        start(learner, experience)

    def after_experience(learner: Any, experience: Any) -> None:
        rows.append(sum(backbone.rows))
        after(learner, experience)

    chain.before_experience, chain.after_experience = before_experience, after_experience  # type: ignore[method-assign]
    experiment.run()
    assert rows == [32, 32, 32]
    assert experiment.results.matrix[1][0] == 1


@pytest.mark.parametrize("preallocate", [True, False])
def test_a_cosine_head_keeps_its_scale_and_old_rows(preallocate: bool, tmp_path: Path) -> None:
    """(C); η is one for all classes, those of the future included."""
    experiment, recorder = run(
        tmp_path, make(preallocate=preallocate), head=lambda: CosineHead(feature_size=16, scale=10.0), optimizer=ADAMW
    )
    scales = [float(state["head.scale"]) for state in recorder.after]
    assert scales[0] != 10
    assert scales == [scales[0]] * 3
    assert torch.equal(recorder.after[0]["head.weight"], recorder.after[2]["head.weight"][:2])
    if preallocate:
        learner = experiment.learner
        assert learner.extras["seq_star"].scale is learner.head.scale
        assert experiment.results.cost["extra_parameters"] == 6 * 16
    restored = make_experiment(
        tmp_path / "b", {"recorder": Recorder(), "seq_star": make(preallocate=preallocate)}
    ).learner
    restored.make_head = lambda: CosineHead(feature_size=16, scale=1.0)
    restored.head = restored.make_head()
    for e in TinyStream():
        restored.build(e.info)
    restored.load_state_dict(experiment.learner.state_dict())
    batch = TinyStream()[0].test.fetch(torch.arange(16))
    with torch.no_grad():
        assert torch.equal(restored.eval()(batch).logits, experiment.learner.eval()(batch).logits)


def tasks_with_the_same_classes() -> TinyStream:
    """Classes 0 and 1 in every task: the rows of a head for each task are not the classes' numbers."""
    stream = TinyStream(scenario="task_incremental")
    for i, e in enumerate(stream.experiences):
        for data in (e.train, e.validation, e.test):
            data.columns["labels"] = data.columns["labels"] % 2  # type: ignore[union-attr]
        stream.experiences[i] = replace(e, classes=(0, 1), n_seen_classes=2)
    return stream


@pytest.mark.parametrize("make_stream", [partial(TinyStream, scenario="task_incremental"), tasks_with_the_same_classes])
def test_classifiers_of_a_task_are_frozen_as_one_s_own(make_stream: Any, tmp_path: Path) -> None:
    """A head with a classifier for each task: rows of other tasks are old."""
    experiment, recorder = run(
        tmp_path, make(), head=lambda: MultiHead(feature_size=16), stream=make_stream(), optimizer=ADAMW
    )
    assert "seq_star" not in experiment.learner.extras  # the loss is over a task's own classes
    rows = "head.linear.weight"
    for i in (1, 2):
        assert torch.equal(recorder.after[i - 1][rows], recorder.after[i][rows][: 2 * i])
        assert not (recorder.before[i][rows][2 * i :] == recorder.after[i][rows][2 * i :]).any()
    first = [row[0] for row in experiment.results.matrix[1:]]
    assert first == [first[0]] * 3
    assert first[0] is not None and first[0] > 0.7


def test_classes_that_come_back_are_trained(tmp_path: Path) -> None:
    _, recorder = run(tmp_path, make(), stream=TinyStream(scenario="domain_incremental"))
    for i in (1, 2):
        assert not (recorder.after[i]["head.linear.weight"] == recorder.after[i - 1]["head.linear.weight"]).any()
    assert "extras.seq_star.linear.weight" not in recorder.after[0]  # no class is still to come


def test_the_preallocated_term_completes_the_cross_entropy(tmp_path: Path) -> None:
    """Of the logits' floats nothing is lost where they are large."""
    stream = TinyStream()
    experiment = make_experiment(tmp_path, {"seq_star": make()}, stream=stream)
    learner = experiment.learner
    learner.build(stream[0].info)
    learner.experience = stream[0]
    learner.chain.before_experience(learner, stream[0])
    with torch.no_grad():
        learner.extras["seq_star"].linear.weight.mul_(300)
    learner.train()
    batch = stream[0].train.fetch(torch.arange(8))
    loss = learner.training_step(batch, 0)
    future = learner.extras["seq_star"].linear
    features = learner.backbone(batch)
    logits = torch.cat([learner.head.linear(features), future(features)[:, 2:]], 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["labels"]), rtol=1e-5, atol=1e-5)
    assert set(learner.last_terms) == {"loss", "task", "seq_star_preallocated"}


def test_nothing_is_held_between_experiences(tmp_path: Path) -> None:
    strategy = make()
    run(tmp_path, strategy)
    assert strategy.held == []
    assert strategy.features.features.numel() == 0
    assert strategy.cost() == {"extra_parameters": 6 * 17}


@pytest.mark.parametrize("other", ["joint", "cumulative", "lora_experts", "linear_probe", "ncm", "gdumb"])
def test_is_combined_with_nothing_that_trains_another_model(other: str) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        Chain({"seq_star": make(), other: from_page(other)})


@pytest.mark.parametrize("other", ["ewc", "lwf", "derpp", "icarl", "er_ace", "a_gem", "si"])
def test_runs_together_with_others(other: str, tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, {"seq_star": make(), other: from_page(other)})
    experiment.run()
    learner: Any = experiment.learner
    assert isinstance(learner.head.linear, nn.Linear)
    assert experiment.results.matrix[1][0] is not None
    assert not any(isinstance(v, Tensor) and v.isnan().any() for v in weights(learner).values())
