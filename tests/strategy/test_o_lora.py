"""O-LoRA: against a loop that keeps all adapters apart and writes the penalty out, entry by entry."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Recorder
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from torch.nn import functional as F
from world import TinyStream, make_experiment, tiny_vit

from clplatform.strategy.base import Chain
from clplatform.strategy.o_lora import OLoRA
from clplatform.types import Batch

# Decay and momentum reach parameters that have no gradient, if they are in the optimizer at all.
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
W, A, B = (f"backbone.layer.{n}.weight" for n in ("base_layer", "lora_A.o_lora", "lora_B.o_lora"))
ALPHA = 6.0


def make(**changes: Any) -> OLoRA:
    strategy = from_page("o_lora", **{"dropout": 0.0, "alpha": ALPHA, "first": "adapter", **changes})
    assert isinstance(strategy, OLoRA)
    return strategy


def run(folder: Path, strategy: OLoRA, stream: Any = None, **options: Any) -> tuple[Any, Recorder, Recorder]:
    """A run with a recorder before the strategy, and one after it."""
    outer, inner, stream = Recorder(), Recorder(), stream or TinyStream()
    start = make_text_experiment if isinstance(stream, TinyTextStream) else make_experiment
    strategies = {"outer": outer, "o_lora": strategy, "inner": inner}
    experiment = start(folder, strategies, stream=stream, **{"trainer": {"max_epochs": 2}, **options})
    experiment.run()
    return experiment.learner.eval(), outer, inner


class Sum:
    """The layer with all its adapters side by side, and the head: h = W x + c + Σ_i (α/r) B_i A_i x."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        self.weight, self.bias = start[W], start["backbone.layer.base_layer.bias"]
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []
        self.head = [start[f"head.linear.{n}"] for n in ("weight", "bias")]

    def logits(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        h = x @ self.weight.T + self.bias
        for a, b in zip(self.a, self.b, strict=True):
            h = h + ALPHA / len(a) * (x @ a.T) @ b.T
        return h.tanh() @ self.head[0].T + self.head[1]

    def penalty(self) -> Tensor:
        """Squares of the entries of A_i A_tᵀ, written out."""
        *earlier, now = self.a
        total = torch.zeros(())
        for old in earlier:
            for row in old:
                for other in now:
                    total = total + (row * other).sum() ** 2
        return total

    def learn(self, a: Tensor, head: list[Tensor], batches: list[Batch], strength: float, l2: float) -> None:
        """One experience of SGD with momentum, as `world.make_learner` has it."""
        self.a, self.b = [*self.a, a.clone()], [*self.b, torch.zeros(16, len(a))]
        n = len(self.head[1])
        self.head = [torch.cat([old, new[n:]]) for old, new in zip(self.head, head, strict=True)]
        trained = [self.a[-1], self.b[-1], *self.head]
        for p in trained:
            p.requires_grad_(True)
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        for batch in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.logits(batch["pixel_values"]), batch["labels"])
            norms = sum(p.square().sum().add(1e-30).sqrt() for p in (self.a[-1], self.b[-1]))
            (loss + strength * self.penalty() + l2 * norms).backward()
            optimizer.step()
        self.a[-1], self.b[-1], *self.head = [p.detach() for p in trained]


@pytest.mark.parametrize(("strength", "l2"), [(0.5, 0.0), (2.0, 0.1), (0.0, 0.0)])
def test_the_same_as_a_loop_with_all_adapters_side_by_side(strength: float, l2: float, tmp_path: Path) -> None:
    strategy, stream = make(orthogonality=strength, l2=l2), TinyStream()
    learner, outer, inner = run(tmp_path, strategy, stream)
    model = Sum(inner.before[0])
    for t in range(3):
        start = inner.before[t]
        head = [start[f"head.linear.{n}"] for n in ("weight", "bias")]
        model.learn(start[A], head, inner.batches[t], strength, l2)
        merged = model.weight + sum(ALPHA / 2 * b @ a for a, b in zip(model.a, model.b, strict=True))
        torch.testing.assert_close(inner.after[t][W], merged, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outer.after[t][A], model.a[-1], rtol=1e-4, atol=1e-5)  # before it is merged
        torch.testing.assert_close(outer.after[t][B], model.b[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(strategy.directions["layer"], torch.cat(model.a), rtol=1e-4, atol=1e-5)
    x = torch.cat([e.test.fetch(torch.arange(16))["pixel_values"] for e in stream])
    batch = {"pixel_values": x, "task_labels": torch.zeros(48, dtype=torch.int64)}
    with torch.no_grad():
        torch.testing.assert_close(learner(batch).logits, model.logits(x), rtol=1e-4, atol=1e-4)


def overlaps(strategy: OLoRA) -> float:
    """Largest cosine between rows of adapters of different experiences."""
    a = F.normalize(strategy.directions["layer"], dim=1)
    apart = torch.arange(len(a))[:, None] // 2 != torch.arange(len(a)) // 2
    return float((a @ a.T)[apart].abs().max())


def test_the_penalty_makes_adapters_orthogonal(tmp_path: Path) -> None:
    found = []
    for strength in (0.0, 5.0):
        strategy = make(orthogonality=strength)
        run(tmp_path / str(strength), strategy, trainer={"max_epochs": 20}, optimizer=ADAMW)
        found.append(overlaps(strategy))
    assert found[0] > 0.3
    assert found[1] < 0.05


@pytest.mark.parametrize("first", ["full", "adapter"])
def test_only_the_adapter_and_the_head_are_trained(first: str, tmp_path: Path) -> None:
    """Weights, and what earlier adapters were merged into, are not touched by decay either."""
    strategy = make(first=first)
    _, outer, inner = run(tmp_path, strategy, optimizer=ADAMW)
    own = [n for n in outer.before[0] if n.startswith("backbone") and "lora" not in n]
    assert own == [W, "backbone.layer.base_layer.bias"]
    for t in range(3):
        whole = first == "full" and t == 0
        start, end, merged = inner.before[t], outer.after[t], inner.after[t]
        assert [torch.equal(start[n], end[n]) for n in own] == [not whole] * 2
        assert [torch.equal(start[n], end[n]) for n in (A, B)] == [whole] * 2
        assert not start[B].any()  # a new adapter changes nothing
        assert not torch.equal(start["head.linear.weight"], end["head.linear.weight"])
        assert torch.equal(merged[W], end[W] + (end[B] @ end[A]) * (ALPHA / 2))
        assert torch.equal(merged["head.linear.weight"], end["head.linear.weight"])
        assert not merged[B].any()
    kept = [outer.after[t][A] for t in range(3) if first == "adapter" or t > 0]
    assert torch.equal(strategy.directions["layer"], torch.cat(kept))  # to the bit
    for t in (1, 2):  # each one is drawn anew
        assert not torch.equal(inner.before[t][A], outer.after[t - 1][A])
        assert inner.before[t][A].abs().max() <= 12**-0.5


def test_terms_are_logged_from_the_second_adapter_on(tmp_path: Path) -> None:
    terms: dict[int, set[str]] = {}

    class Spy(Recorder):
        def after_batch(self, learner: Any, batch: Any, output: Any) -> None:
            terms.setdefault(learner.experience.index, set()).update(learner.last_terms)

    strategies = {"o_lora": make(first="full", l2=0.1), "spy": Spy()}
    make_experiment(tmp_path, strategies).run()
    assert terms[0] == {"loss", "task"}  # the whole backbone
    assert terms[1] == {"loss", "task", "o_lora_l2"}
    assert terms[2] == {"loss", "task", "o_lora_l2", "o_lora_orthogonality"}


def test_dropout_is_in_training_only(tmp_path: Path) -> None:
    with_dropout, _, _ = run(tmp_path / "a", make(dropout=0.5))
    without, _, _ = run(tmp_path / "b", make(dropout=0.0))
    assert not torch.equal(with_dropout.backbone.layer.base_layer.weight, without.backbone.layer.base_layer.weight)
    batch = TinyStream()[0].test.fetch(torch.arange(16))
    assert torch.equal(with_dropout(batch).logits, with_dropout(batch).logits)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_transformers_adapt_queries_and_values(kind: str, tmp_path: Path) -> None:
    strategy = make(orthogonality=1.0)
    options: dict[str, Any] = {"backbone": tiny_vit()} if kind == "vit" else {"stream": TinyTextStream()}
    learner, outer, inner = run(tmp_path, strategy, optimizer=ADAMW, **options)
    n_layers = 2 if kind == "vit" else 1
    assert len(strategy.directions) == 2 * n_layers
    assert {d.shape for d in strategy.directions.values()} == {(3 * 2, 16)}
    adapted = {f"backbone.{name}.base_layer.weight" for name in strategy.directions}
    for t in range(3):
        for name, value in inner.before[t].items():
            if name.startswith("backbone.") and "lora_" not in name:
                assert torch.equal(value, outer.after[t][name]), name
                assert torch.equal(value, inner.after[t][name]) != (name in adapted), name
    assert strategy.cost() == {"extra_parameters": n_layers * 2 * (2 * (16 + 16) + 3 * 2 * 16)}
    assert strategy.cost()["extra_parameters"] == sum(
        p.numel() for n, p in learner.named_parameters() if "lora_" in n
    ) + (sum(d.numel() for d in strategy.directions.values()))


@pytest.mark.parametrize("other", ["ewc", "gpm", "packnet", "lora_experts", "seq_star", "joint", "icarl"])
def test_is_not_combined_with_what_needs_weights_that_last(other: str) -> None:
    pair = f"(o_lora cannot be combined with {other}|{other} cannot be combined with o_lora) .*: [a-z]+"
    with pytest.raises(ValueError, match=pair):
        Chain({other: from_page(other), "o_lora": make()})


@pytest.mark.parametrize("other", ["derpp", "er_ace", "lwf", "ranpac"])
def test_learns_beside(other: str, tmp_path: Path) -> None:
    alone, both = ({"o_lora": make(first="full")} for _ in range(2))
    both[other] = from_page(other)  # type: ignore[assignment]
    matrices = []
    for i, strategies in enumerate((alone, both)):
        experiment = make_experiment(tmp_path / str(i), strategies, trainer={"max_epochs": 6})  # type: ignore[arg-type]
        matrices.append(experiment.run().matrix)
    assert sum(matrices[1][-1]) > sum(matrices[0][-1])  # type: ignore[arg-type]
