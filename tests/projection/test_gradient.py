"""Projections of gradients against closed forms, a general solver and Avalanche's plugins on the same gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F
from world import TinyBackbone, TinyStream, make_learner

from clplatform.projection.gradient import gradient_of, project, project_one, trained_parameters
from clplatform.strategy.finetuning import Finetuning
from clplatform.types import Batch

SHAPES = [(3, 4), (5,), (2, 2), ()]


def parameters(seed: int, missing: tuple[int, ...] = ()) -> list[nn.Parameter]:
    """Parameters with gradients, without one where they are `missing`."""
    g = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    for i, p in enumerate(made):
        gradient = torch.randn(p.shape, generator=g, dtype=p.dtype)
        p.grad = None if i in missing else gradient
    return made


def gradient(seed: int, missing: tuple[int, ...] = ()) -> list[Tensor | None]:
    return [p.grad for p in parameters(seed, missing)]


def flat(values: Any) -> Tensor:
    """One vector, zero where there is no gradient."""
    full = [torch.zeros(s, dtype=torch.float64) if v is None else v for s, v in zip(SHAPES, values, strict=True)]
    return torch.cat([v.flatten() for v in full])


def grads(made: list[nn.Parameter]) -> list[Tensor | None]:
    return [p.grad for p in made]


def conflicting(seed: int, missing: tuple[int, ...] = ()) -> list[Tensor | None]:
    """A reference whose inner product with the gradient of `parameters(0)` is negative."""
    reference = gradient(seed, missing)
    if flat(reference) @ flat(gradient(0)) > 0:
        reference = [None if r is None else -r for r in reference]
    return reference


# -- one reference: A-GEM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(1, 6))
def test_one_reference_closed_form(seed: int) -> None:
    made, reference = parameters(0), conflicting(seed)
    g, r = flat(grads(made)), flat(reference)
    project_one(made, reference)
    found = flat(grads(made))
    torch.testing.assert_close(found, g - (g @ r) / (r @ r) * r)
    assert abs(found @ r) < 1e-12
    assert found @ g > 0


@pytest.mark.parametrize("how", [project_one, lambda p, r: project(p, [r, r], 0.5)])
def test_without_a_conflict_it_stays_to_the_bit(how: Any) -> None:
    made = parameters(0)
    reference = [None if r is None else -r for r in conflicting(3)]
    before = [p.grad.clone() for p in made]
    how(made, reference)
    assert all(torch.equal(p.grad, b) for p, b in zip(made, before, strict=True))


@pytest.mark.parametrize("how", [project_one, lambda p, r: project(p, [r], 0.0)])
@pytest.mark.parametrize(("missing", "of_reference"), [((1,), ()), ((), (0,)), ((1, 2), (2, 3)), ((0, 3), (1, 2))])
def test_a_parameter_that_a_loss_does_not_use_counts_as_zero(how: Any, missing: Any, of_reference: Any) -> None:
    made, reference = parameters(0, missing), gradient(4, of_reference)
    g, r = flat(grads(made)), flat(reference)
    if g @ r == 0:  # nothing in common: no conflict
        how(made, reference)
        assert [p.grad is None for p in made] == [i in missing for i in range(4)]
        return
    if g @ r > 0:
        reference, r = [None if x is None else -x for x in reference], -r
    how(made, reference)
    torch.testing.assert_close(flat(grads(made)), g - (g @ r) / (r @ r) * r)
    # It gets a gradient where the correction has one, and none where neither loss depends on it.
    assert [p.grad is None for p in made] == [i in missing and i in of_reference for i in range(4)]


@pytest.mark.parametrize("how", [project_one, lambda p, r: project(p, [r], 0.5)])
def test_a_parameter_without_gradients_gets_none_when_there_is_no_conflict(how: Any) -> None:
    """A gradient of zeros would move it by the optimizer's momentum."""
    made = parameters(0, (1,))
    how(made, [None if r is None else -r for r in conflicting(3, (0,))])
    assert made[1].grad is None


@pytest.mark.parametrize("how", [project_one, lambda p, r: project(p, [r], 0.0)])
def test_references_of_zeros_and_gradients_that_are_not_finite_change_nothing(how: Any) -> None:
    made = parameters(0)
    before = flat(grads(made))
    how(made, [torch.zeros_like(p) for p in made])
    how(made, [None] * 4)
    assert torch.equal(flat(grads(made)), before)
    made[0].grad[0, 0] = torch.nan  # as when float16 overflows: the optimizer's step is left out
    how(made, conflicting(3))
    assert torch.equal(flat(grads(made))[1:], before[1:])


# -- several references: GEM ----------------------------------------------------------------------------------------------


def references(n: int) -> list[list[Tensor | None]]:
    """Of n experiences, the last without one of the parameters."""
    made = [conflicting(seed) for seed in range(1, n)]
    return [*made, conflicting(n, (1,))]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_several_references_are_the_primal_s_solution(n: int) -> None:
    """min ½ ‖g − g̃‖² with G g̃ ≥ 0 by a general solver."""
    made, past = parameters(0), references(n)
    g, G = flat(grads(made)).numpy(), torch.stack([flat(r) for r in past]).numpy()
    project(made, past, 0.0)
    found = flat(grads(made)).numpy()
    constraint = {"type": "ineq", "fun": lambda x: G @ x, "jac": lambda x: G}
    expected = minimize(
        lambda x: 0.5 * ((x - g) ** 2).sum(), np.zeros_like(g), jac=lambda x: x - g, constraints=[constraint],
        method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert expected.success
    np.testing.assert_allclose(found, expected.x, atol=1e-6)
    assert (G @ found > -1e-10).all()


def test_the_margin_projects_what_it_adds() -> None:
    made, past = parameters(0), references(4)
    G = torch.stack([flat(r) for r in past])
    shifted = parameters(0)
    total = (flat(grads(shifted)) + 0.5 * G.sum(0)).split([p.numel() for p in shifted])
    for p, part in zip(shifted, total, strict=True):
        p.grad = part.view_as(p)
    assert (G @ flat(grads(shifted)) < 0).any()  # still a conflict
    project(made, past, 0.5)
    project(shifted, past, 0.0)
    torch.testing.assert_close(flat(grads(made)), flat(grads(shifted)))


def test_one_constraint_without_margin_is_the_closed_form() -> None:
    made, other, reference = parameters(0), parameters(0), conflicting(2)
    project(made, [reference], 0.0)
    project_one(other, reference)
    torch.testing.assert_close(flat(grads(made)), flat(grads(other)))


# -- Avalanche's plugins on the same gradients ----------------------------------------------------------------------------


def host(made: list[nn.Parameter]) -> Any:
    model = nn.ParameterDict({str(i): p for i, p in enumerate(made)})
    return SimpleNamespace(model=model, device="cpu", clock=SimpleNamespace(train_exp_counter=1))


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
@pytest.mark.parametrize("seed", range(1, 6))
def test_agrees_with_avalanche_s_a_gem(seed: int) -> None:
    from avalanche.training.plugins import AGEMPlugin

    made, theirs, reference = parameters(0), parameters(0), gradient(seed)
    plugin: Any = AGEMPlugin(patterns_per_experience=1, sample_size=1)
    plugin.buffers, plugin.reference_gradients = [None], flat(reference)
    plugin.after_backward(host(theirs))
    project_one(made, reference)
    torch.testing.assert_close(flat(grads(made)), flat(grads(theirs)))


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_agrees_with_avalanche_s_gem(n: int, margin: float) -> None:
    """It adds 10⁻³ to the diagonal of G Gᵀ, which long gradients hide, and returns float32."""
    from avalanche.training.plugins import GEMPlugin

    made, theirs, past = parameters(0), parameters(0), references(n)
    for p in (*made, *theirs):
        p.grad.mul_(100)
    past = [[None if r is None else 100 * r for r in one] for one in past]
    plugin: Any = GEMPlugin(patterns_per_experience=1, memory_strength=margin)
    plugin.G = torch.stack([flat(r) for r in past])
    plugin.after_backward(host(theirs))
    project(made, past, margin)
    assert not torch.equal(flat(grads(made)), 100 * flat(gradient(0)))
    torch.testing.assert_close(flat(grads(made)), flat(grads(theirs)), rtol=1e-5, atol=1e-4)


# -- where references come from -------------------------------------------------------------------------------------------


class Normalised(TinyBackbone):
    """With batch-norm."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.norm = nn.BatchNorm1d(self.feature_size)

    def forward(self, batch: Batch) -> Tensor:
        return self.dropout(self.norm(self.layer(batch["pixel_values"].flatten(1)).tanh()))


def setting(**options: Any) -> tuple[Any, Batch]:
    stream = TinyStream(2)
    learner = make_learner(stream, {"finetuning": Finetuning()}, backbone=Normalised(0.5), **options)
    learner.build(stream[0].info)
    learner._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=None))
    return learner.train(), stream[0].train.fetch(torch.arange(8))


def test_it_is_the_gradient_of_a_training_step_and_leaves_grad_alone() -> None:
    """Dropout is drawn, batch-norm takes the rows' statistics and remembers them."""
    learner, rows = setting()
    named = dict(learner.named_parameters())
    named["head.linear.bias"].grad = torch.ones(2)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(8, 16), 0.5)
    torch.manual_seed(5)
    found = gradient_of(learner, rows, trained_parameters(learner))
    h = torch.tanh(rows["pixel_values"].flatten(1) @ named["backbone.layer.weight"].T + named["backbone.layer.bias"])
    whitened = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    z = whitened * named["backbone.norm.weight"] + named["backbone.norm.bias"]
    loss = F.cross_entropy(learner.head.linear(z * mask), rows["labels"])
    for a, b in zip(found, torch.autograd.grad(loss, list(named.values())), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(learner.backbone.norm.running_mean, 0.1 * h.mean(0))
    assert torch.equal(named["head.linear.bias"].grad, torch.ones(2))
    assert sum(p.grad is not None for p in learner.parameters()) == 1


def test_frozen_parameters_have_no_part_and_rows_are_augmented() -> None:
    def double(batch: Batch, generator: torch.Generator) -> Batch:
        return {**batch, "pixel_values": 2 * batch["pixel_values"]}

    learner, rows = setting(augment=double)
    learner.backbone.dropout.p = 0.0
    learner.backbone.layer.requires_grad_(False)
    found = gradient_of(learner, rows, trained_parameters(learner))
    assert len(found) == 4
    learner.augmentation = None
    twice = gradient_of(learner, {**rows, "pixel_values": 2 * rows["pixel_values"]}, trained_parameters(learner))
    assert all(torch.equal(a, b) for a, b in zip(found, twice, strict=True))


@pytest.mark.parametrize("scaler", [None, object()])
def test_precision_is_the_run_s_but_for_float16(scaler: Any) -> None:
    learner, rows = setting()
    learner.trainer.precision_plugin.scaler = scaler
    learner.precision_context = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    seen: list[torch.dtype] = []
    learner.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.no_grad():  # optimizers step without gradients
        found = gradient_of(learner, rows, trained_parameters(learner))
    assert seen == [torch.bfloat16 if scaler is None else torch.float32]
    assert {g.dtype for g in found if g is not None} == {torch.float32}
