"""InfLoRA: directions and memory are those of NumPy's SVD, and earlier inputs give what they gave."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import Recorder
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, tiny_vit

from clplatform.strategy.base import Chain
from clplatform.strategy.inf_lora import InfLoRA
from clplatform.types import Batch

# Decay and momentum reach parameters that have no gradient, if they are in the optimizer at all.
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
W, A, B = (f"backbone.layer.{n}.weight" for n in ("base_layer", "lora_A.inf_lora", "lora_B.inf_lora"))  # PEFT's names
HEAD = ("head.linear.weight", "head.linear.bias")


def make(**changes: Any) -> InfLoRA:
    strategy = from_page("inf_lora", **{"rank": 2, "scale": 1.5, "threshold": 0.8, "first": "adapter", **changes})
    assert isinstance(strategy, InfLoRA)
    return strategy


def run(folder: Path, strategy: InfLoRA, stream: Any = None, **options: Any) -> tuple[Any, Recorder, Recorder]:
    """A run with a recorder before the strategy, and one after it."""
    outer, inner, stream = Recorder(), Recorder(), stream or TinyStream()
    start = make_text_experiment if isinstance(stream, TinyTextStream) else make_experiment
    strategies = {"outer": outer, "inf_lora": strategy, "inner": inner}
    experiment = start(folder, strategies, stream=stream, **{"trainer": {"max_epochs": 2}, **options})
    experiment.run()
    return experiment.learner.eval(), outer, inner


def inputs(stream: Any, index: int) -> np.ndarray:
    """H_t [d, n]."""
    train = stream[index].train
    return train.fetch(torch.arange(len(train)))["pixel_values"].flatten(1).double().numpy().T


def svd_grown(old: np.ndarray, r: np.ndarray, share: float) -> np.ndarray:
    """GPM's Eq. 5–9 on R itself."""
    u, s, _ = np.linalg.svd(r - old @ (old.T @ r), full_matrices=False)
    held, k = ((old.T @ r) ** 2).sum(), 0
    while held < share * (r**2).sum():
        held, k = held + s[k] ** 2, k + 1
    return np.concatenate([old, u[:, :k]], axis=1)


@pytest.mark.parametrize("first", ["full", "adapter"])
def test_directions_and_memory_are_those_of_an_svd(first: str, tmp_path: Path) -> None:
    """ε grows by equal steps: 0.6, 0.7, 0.8 of experience 0, 1, 2 of three, towards 0.9."""
    stream, strategy = TinyStream(), make(threshold=0.6, final=0.9, first=first)
    _, _, inner = run(tmp_path, strategy, stream)
    memory, sizes = np.zeros((12, 0)), []
    for t, share in enumerate((0.6, 0.7, 0.8)):
        h = inputs(stream, t)
        if first == "adapter" or t > 0:
            u, s, _ = np.linalg.svd(h - memory @ (memory.T @ h))
            assert s[1] > 1.02 * s[2]  # else the directions would not be unique
            found = inner.before[t][A].double().numpy()
            assert found.shape == (2, 12)
            np.testing.assert_allclose(np.abs(found @ u[:, :2]), 1.5 * np.eye(2), atol=1e-4)  # up to their signs
            np.testing.assert_allclose(found @ memory, 0, atol=1e-5)
        memory = svd_grown(memory, h, share)
        sizes.append(memory.shape[1])
    assert 0 < sizes[0] < sizes[1] < sizes[2] < 12
    outside = strategy.memory.outside("layer", torch.eye(12, dtype=torch.float64))
    np.testing.assert_allclose(outside, np.eye(12) - memory @ memory.T, atol=1e-5)
    assert strategy.cost() == {"extra_parameters": 2 * (12 + 16) + 12 * min(sizes[2], 12 - sizes[2])}


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_earlier_inputs_give_the_same_up_to_the_discarded_energy(share: float, tmp_path: Path) -> None:
    """Four samples of each experience in 12 dimensions: with all of their energy there is room until the third."""
    stream = TinyStream(3, per_class=2)
    strategy = make(threshold=share, final=share, rank=4)
    _, outer, inner = run(tmp_path, strategy, stream, optimizer=ADAMW, trainer={"max_epochs": 20})
    for t in range(2):
        h = torch.from_numpy(inputs(stream, t))
        for later in range(t + 1, 3):
            a, b = (outer.after[later][n].double() for n in (B, A))  # the paper's A_t and B_t
            assert a.abs().max() > 0.1
            designed = (b @ h).square().sum()  # how much of the earlier inputs an adapter sees
            assert designed <= 1.5**2 * (1 - share) * h.square().sum() + 1e-8
            assert (designed > 1e-3) == (share < 1)
            new = torch.from_numpy(inputs(stream, later))
            assert (a @ b @ new).abs().max() > 0.1  # and of its own
        change = ((inner.after[2][W] - inner.after[t][W]).double() @ h).abs().max()
        assert (change < 1e-5) == (share == 1)


def test_what_is_left_of_nothing_is_nothing(tmp_path: Path) -> None:
    """32 samples of an experience span all 12 dimensions: with ε = 1 only the classifiers learn from then on."""
    strategy = make(threshold=1.0, rank=3)
    _, outer, inner = run(tmp_path, strategy, optimizer=ADAMW)
    assert inner.before[0][A].any()
    assert not torch.equal(inner.after[0][W], inner.before[0][W])
    for t in (1, 2):
        assert not inner.before[t][A].any()
        assert torch.equal(inner.after[t][W], inner.after[0][W])
        assert not torch.equal(outer.after[t][HEAD[0]], inner.before[t][HEAD[0]])
    assert strategy.memory.bases["layer"].shape == (12, 0)


@pytest.mark.parametrize("first", ["full", "adapter"])
def test_only_one_matrix_and_the_own_classifiers_are_trained(first: str, tmp_path: Path) -> None:
    _, outer, inner = run(tmp_path, make(first=first), optimizer=ADAMW)
    own = [n for n in outer.before[0] if n.startswith("backbone") and "lora" not in n]
    assert own == [W, "backbone.layer.base_layer.bias"]
    for t in range(3):
        whole = first == "full" and t == 0
        start, end, merged = inner.before[t], outer.after[t], inner.after[t]
        assert [torch.equal(start[n], end[n]) for n in own] == [not whole] * 2
        assert torch.equal(start[A], end[A])
        assert torch.equal(start[B], end[B]) == whole
        assert not start[B].any()  # a new adapter changes nothing
        for n in HEAD:
            assert torch.equal(start[n][: 2 * t], end[n][: 2 * t])  # of earlier classes, to the bit
            assert not (start[n][2 * t :] == end[n][2 * t :]).any()
        assert torch.equal(merged[W], end[W] + end[B] @ end[A])
        assert torch.equal(merged[own[1]], end[own[1]])
        assert not merged[B].any()


def learn(start: dict[str, Tensor], batches: list[Batch], own: list[int] | None) -> dict[str, Tensor]:
    """One experience written out: h = W x + c + A B x, where A and the head are trained."""
    a, head, bias = (start[n].clone().requires_grad_(True) for n in (B, *HEAD))
    optimizer = torch.optim.SGD([a, head, bias], lr=0.1, momentum=0.9)
    for batch in batches:
        x, y = batch["pixel_values"].flatten(1), batch["labels"]
        h = x @ start[W].T + start["backbone.layer.base_layer.bias"] + x @ start[A].T @ a.T
        z = h.tanh() @ head.T + bias
        rows = torch.arange(len(y))
        z_new = z if own is None else z[:, own]
        losses = torch.where(batch["source"] == 0, z_new.logsumexp(1), z.logsumexp(1)) - z[rows, y]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return {B: a.detach(), HEAD[0]: head.detach(), HEAD[1]: bias.detach()}


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("classes", ["own", "seen"])
def test_the_same_as_a_loop_written_out(classes: str, replay: bool, tmp_path: Path) -> None:
    """Rows that a memory adds compete among all classes."""
    strategy, outer, inner = make(classes=classes), Recorder(), Recorder()
    strategies: dict[str, Any] = {"outer": outer, "inf_lora": strategy}
    if replay:
        strategies["replay"] = from_page("replay")
    make_experiment(tmp_path, {**strategies, "inner": inner}).run()
    for t in range(3):
        assert replay == any((b["source"] != 0).any() for b in inner.batches[t]) or t == 0
        expected = learn(inner.before[t], inner.batches[t], [2 * t, 2 * t + 1] if classes == "own" else None)
        for n, value in expected.items():
            torch.testing.assert_close(outer.after[t][n], value, rtol=1e-4, atol=1e-5)


def test_smoothing_is_over_the_classes_that_compete(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, {"inf_lora": make()}, label_smoothing=0.2)
    experiment.run()
    learner, stream = experiment.learner, experiment.stream
    batch = {**stream[2].train.fetch(torch.arange(8))}
    batch["source"] = torch.zeros(8, dtype=torch.int64)
    output = learner(batch)
    expected = F.cross_entropy(output.logits[:, 4:], batch["labels"] - 4, label_smoothing=0.2)
    torch.testing.assert_close(learner.chain.task_loss(learner, batch, output), expected)


def test_a_part_of_the_samples_is_enough_where_it_is_asked_for(tmp_path: Path) -> None:
    """One sample has one direction."""
    stream, strategy = TinyStream(), make(samples=1, threshold=1.0, rank=3)
    _, _, inner = run(tmp_path, strategy, stream)
    for t in range(3):
        x = torch.from_numpy(inputs(stream, t)).T
        found = inner.before[t][A].double()
        assert [bool(row.any()) for row in found] == [True, False, False]
        if t == 0:
            cosines = F.cosine_similarity(x, found[:1]).abs()
            assert cosines.max() > 1 - 1e-6
            assert cosines.sort().values[-2] < 1 - 1e-3
    assert strategy.memory.bases["layer"].shape[1] <= 3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_what_a_transformer_made_of_remembered_inputs_it_makes_later(kind: str, tmp_path: Path) -> None:
    """All positions of one sample leave room in 16 dimensions: its features stay, those of the others move."""
    stream: Any = TinyTextStream(3) if kind == "bert" else TinyStream(3)
    strategy = make(samples=1, threshold=1.0, rank=4, scale=8.0)
    chosen: list[Any] = []
    features: list[Tensor] = []
    data = stream[0].train.fetch(torch.arange(len(stream[0].train)))

    class Spy(Recorder):
        def after_experience(self, learner: Any, experience: Any) -> None:
            learner.eval()
            features.append(learner(data).features)

    energies = strategy.energies

    def spy(learner: Any, experience: Any) -> dict[str, Tensor]:
        state = learner.generator.get_state()
        twin = torch.Generator()
        twin.set_state(state)
        chosen.append(torch.randperm(len(experience.train), generator=twin)[0].item())
        return energies(learner, experience)

    strategy.energies = spy  # type: ignore[method-assign]
    options: dict[str, Any] = {"backbone": tiny_vit()} if kind == "vit" else {}
    start = make_text_experiment if kind == "bert" else make_experiment
    strategies = {"inf_lora": strategy, "spy": Spy()}
    with torch.enable_grad():
        start(tmp_path, strategies, stream=stream, optimizer=ADAMW, trainer={"max_epochs": 8}, **options).run()
    layers = {name.rpartition(".")[2] for name in strategy.memory.bases}
    assert layers == ({"key", "value"} if kind == "bert" else {"k_proj", "v_proj"})
    remembered = chosen[1]  # asked twice in an experience: for the directions, then for the memory
    for later in features[1:]:
        change = (later - features[0]).abs().amax(1)
        assert change[remembered] < 1e-4
        assert change.median() > 1e-2


@pytest.mark.parametrize("other", ["ewc", "gpm", "packnet", "lora_experts", "seq_star", "joint", "icarl", "derpp"])
def test_is_not_combined_with_what_needs_weights_that_last(other: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be combined.*: [a-z]+"):
        Chain({other: from_page(other), "inf_lora": make()})
