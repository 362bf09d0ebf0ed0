"""Gradual unfreezing against a hand-written loop, and block by block: what is trained when, and at which rate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import text_encoder
from naive import Model, Recorder, close
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment, tiny_bert
from torch.nn import functional as F
from world import TinyStream, make_experiment, make_learner, same, weights

from clplatform.check.persistence import resumes
from clplatform.check.subject import Subject, page
from clplatform.strategy.base import Chain, Strategy
from clplatform.strategy.gradual_unfreezing import GradualUnfreezing, depth_of
from clplatform.tuning.lora import LoRA
from clplatform.types import ClplatformError

ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)  # which moves what has no gradient, if nothing holds it


def make(**changes: Any) -> GradualUnfreezing:
    strategy = from_page("gradual_unfreezing", **changes)
    assert isinstance(strategy, GradualUnfreezing)
    return strategy


class Watch(Strategy):
    """Which blocks of the backbone are trained, and which have moved, in each epoch."""

    family = "observer"

    def __init__(self) -> None:
        self.trained: list[list[bool]] = []
        self.moved: list[list[bool]] = []

    def extend_batch(self, learner: Any, batch: Any) -> Any:
        if not learner.trainer.is_last_batch and len(self.trained) == len(self.moved):
            blocks = learner.backbone.blocks()
            self.trained.append([any(p.requires_grad for p in b.parameters()) for b in blocks])
            self.before = [[p.detach().clone() for p in b.parameters()] for b in blocks]
        return batch

    def after_epoch(self, learner: Any) -> None:
        blocks = learner.backbone.blocks()
        self.moved.append(
            [
                any(not torch.equal(p, q) for p, q in zip(b.parameters(), old, strict=True))
                for b, old in zip(blocks, self.before, strict=True)
            ]
        )


def watched(folder: Path, strategy: Strategy, epochs: int = 5, **options: Any) -> Watch:
    """A BERT of three layers, so of four blocks, in two experiences."""
    watch = Watch()
    chain = {"gradual_unfreezing": strategy, "watch": watch}
    experiment = make_text_experiment(
        folder, chain, stream=TinyTextStream(2), optimizer=ADAMW, trainer={"max_epochs": epochs}, **options
    )
    experiment.learner.backbone = text_encoder("bert", dropout=0.0)
    experiment.run()
    return watch


def steps(n: int) -> list[bool]:
    """The top n of four blocks; the embeddings are the first in the list and the last to come."""
    return [False] * (4 - n) + [True] * n


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"experiences": "each"}, [0, 1, 2, 3, 4] * 2),
        ({"experiences": "first"}, [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]),
        ({"experiences": "none"}, [4] * 10),
        ({"blocks": 3}, [0, 3, 4, 4, 4] * 2),
        ({"epochs": 2}, [0, 0, 1, 1, 2] * 2),
        ({"epochs": 2, "blocks": 2}, [0, 0, 2, 2, 4] * 2),
    ],
)
def test_blocks_are_unfrozen_from_the_top(settings: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    """What is frozen does not move by a bit, whatever the weight decay; and what is not moves."""
    watch = watched(tmp_path, make(**settings))
    assert watch.trained == [steps(n) for n in expected]
    assert watch.moved == watch.trained


@pytest.mark.parametrize("rate_decay", [1.0, 2.6])
@pytest.mark.parametrize("experiences", ["each", "first", "none"])
@pytest.mark.parametrize("with_replay", [False, True])
def test_equals_a_hand_written_loop(experiences: str, rate_decay: float, with_replay: bool, tmp_path: Path) -> None:
    """The tiny world's perceptron has one block: in the first of three epochs the head is trained alone."""
    recorder = Recorder()
    before: dict[str, Strategy] = {"replay": from_page("replay", capacity=20)} if with_replay else {}
    strategies = {**before, "recorder": recorder, "own": make(experiences=experiences, rate_decay=rate_decay)}
    experiment = make_experiment(tmp_path, strategies, stream=TinyStream(2, noise=1.5), trainer={"max_epochs": 3})
    experiment.run()
    model = Model(recorder.before[0])
    for i, (start, batches) in enumerate(zip(recorder.before, recorder.batches, strict=True)):
        model.grow(start)
        n = len(batches) // 3
        head = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
        layer = torch.optim.SGD(model.layer.parameters(), lr=0.1 / rate_decay, momentum=0.9)
        for j, batch in enumerate(batches):
            frozen = j < n and (experiences == "each" or (experiences == "first" and i == 0))
            model.zero_grad()
            F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
            head.step()
            if not frozen:
                layer.step()
    close(model, experiment.learner, rtol=1e-4, atol=1e-5)


def test_switched_off_it_is_fine_tuning(tmp_path: Path) -> None:
    off = make_experiment(tmp_path / "a", {"own": make(experiences="none", rate_decay=1.0)})
    plain = make_experiment(tmp_path / "b", {"finetuning": from_page("finetuning")})
    off.run()
    plain.run()
    assert same(weights(off.learner), weights(plain.learner))


def test_each_block_learns_more_slowly_than_the_one_above() -> None:
    """Depths: the head 0, the pooler with the top layer 1, …, the embeddings 3; decay and other settings of a group stay."""
    stream = TinyTextStream(1)
    backbone = text_encoder("bert", pooling="pooler")
    learner = make_learner(stream, {"own": make(rate_decay=2.0)}, backbone=backbone, optimizer=ADAMW)
    learner.build(stream[0].info)
    optimizer = learner.make_optimizer()
    name_of = {p: name for name, p in learner.named_parameters()}
    found = {name_of[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == dict(learner.named_parameters()).keys()
    for name, (lr, decay) in found.items():
        depth = 0 if name.startswith("head.") else 1 if ".pooler." in name else 4
        for layer in range(3):
            depth = 3 - layer if f".layer.{layer}." in name else depth
        assert lr == pytest.approx(0.01 / 2.0**depth), name
        assert decay == (0.1 if dict(learner.named_parameters())[name].ndim >= 2 else 0.0)


def test_a_group_s_own_rate_is_the_one_that_is_divided() -> None:
    backbone = text_encoder("bert")
    learner = make_learner(TinyTextStream(1), {}, backbone=backbone)
    top = next(backbone.blocks()[-1].parameters())
    groups = make(rate_decay=4.0).parameter_groups(learner, [{"params": [top], "lr": 8.0}])
    assert groups == [{"params": [top], "lr": 2.0}]


def test_every_parameter_has_a_depth() -> None:
    backbone = text_encoder("bert", pooling="pooler")
    depths = depth_of(backbone)
    assert depths.keys() == set(backbone.parameters())
    assert sorted(set(depths.values())) == [1, 2, 3, 4]


def test_afterwards_importances_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """With too few epochs to unfreeze all: EWC holds every weight all the same."""
    chain = {"own": make(), "ewc": from_page("ewc", samples=16)}
    experiment = make_text_experiment(tmp_path, chain, stream=TinyTextStream(2), trainer={"max_epochs": 1})
    experiment.run()
    learner: Any = experiment.learner
    assert all(p.requires_grad for p in learner.parameters())
    penalty = chain["ewc"].loss(learner, {}, None)["ewc"]  # type: ignore[arg-type]
    gradients = torch.autograd.grad(penalty, list(learner.backbone.parameters()), allow_unused=True)
    assert all(g is not None for g in gradients)


def test_of_a_tuned_backbone_only_what_is_tuned_is_unfrozen(tmp_path: Path) -> None:
    watch, own = Watch(), make(experiences="first")
    experiment = make_text_experiment(
        tmp_path, {"own": own, "watch": watch}, stream=TinyTextStream(2), optimizer=ADAMW, trainer={"max_epochs": 2}
    )
    bert = tiny_bert()
    LoRA(rank=2, alpha=4.0, dropout=0.0, targets="attention").apply(bert, TinyTextStream(1).info.input)
    names = {name for name, p in bert.named_parameters() if p.requires_grad}
    experiment.learner.backbone = bert
    experiment.run()
    assert names and {name for name, p in bert.named_parameters() if p.requires_grad} == names
    assert watch.trained == [[False, False], [False, True], [False, True], [False, True]]


def test_a_run_that_was_stopped_in_the_middle_of_a_frozen_epoch_goes_on_frozen() -> None:
    """The suite's own settings have one frozen epoch, before which it is stopped; here it is stopped in the second."""
    resumes(Subject({"gradual_unfreezing": page("gradual_unfreezing") | {"epochs": 2}}))


def test_steps_of_frozen_blocks_cost_less(tmp_path: Path) -> None:
    """Gradients end at the lowest block that is trained."""
    counts: list[int] = []

    class Count(Strategy):
        family = "observer"

        def after_batch(self, learner: Any, batch: Any, output: Any) -> None:
            counts.append(sum(p.grad is not None for p in learner.backbone.parameters()))

    chain = {"own": make(), "count": Count()}
    experiment = make_text_experiment(tmp_path, chain, stream=TinyTextStream(1), trainer={"max_epochs": 3})
    experiment.run()
    backbone: Any = experiment.learner.backbone
    top, whole = len(list(backbone.blocks()[1].parameters())), len(list(backbone.parameters()))
    assert counts == [0] * 4 + [top] * 4 + [whole] * 4


def test_what_it_cannot_be_combined_with_is_refused(tmp_path: Path) -> None:
    for name in ("gem", "lora_experts", "packnet", "l2p", "slda", "avalanche"):
        with pytest.raises(ValueError, match="cannot be combined"):
            Chain({"own": make(), name: from_page(name)})
    for i, options in enumerate(({"probe": from_page("linear_probe")}, {})):
        experiment = make_experiment(tmp_path / str(i), {"own": make(), **options})
        experiment.learner.backbone.requires_grad_(False)
        with pytest.raises(ClplatformError, match="nothing of the backbone is trained"):
            experiment.run()
