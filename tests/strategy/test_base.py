"""The chain: what is combined how, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from world import TinyStream, make_learner

from clplatform.strategy.base import Chain, Strategy
from clplatform.types import Output, Stage


class Scale(Strategy):
    """Opens many doors, each of which shows where in the chain it stands."""

    def __init__(self, number: int, term: str = "term") -> None:
        self.number, self.term = number, term

    def train_data(self, learner: Any, experience: Any, data: Any) -> Any:
        return [*data, self.number]

    def extend_batch(self, learner: Any, batch: Any) -> Any:
        return {**batch, "order": [*batch["order"], self.number]}

    def forward(self, learner: Any, batch: Any, run: Any) -> Output:
        output = run({**batch, "x": batch["x"] + self.number})
        return Output(output.logits * 10 + self.number, output.features)

    def loss(self, learner: Any, batch: Any, output: Output) -> dict[str, torch.Tensor]:
        return {self.term: torch.tensor(float(self.number))}

    def cost(self) -> dict[str, int | float]:
        return {"stored_samples": self.number}

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


@pytest.fixture
def chain() -> Chain:
    return Chain({"a": Scale(1), "b": Scale(2, term="b")})


def test_data_and_batches_pipe_in_the_order_typed(chain: Chain) -> None:
    assert chain.train_data(None, None, [0]) == [0, 1, 2]  # type: ignore[arg-type, comparison-overlap]
    assert chain.extend_batch(None, {"order": []})["order"] == [1, 2]  # type: ignore[arg-type]


def test_the_first_strategy_typed_is_the_outermost_around_the_model(chain: Chain) -> None:
    """a(b(model)): a sees the batch first and the logits last."""
    output = chain.forward(None, {"x": torch.tensor(0)}, lambda batch: Output(batch["x"], batch["x"]))  # type: ignore[arg-type]
    assert output.features.item() == 3
    assert output.logits.item() == (3 * 10 + 2) * 10 + 1


def test_terms_are_named_after_their_strategy_and_costs_add(chain: Chain) -> None:
    terms = chain.loss(None, {}, None)  # type: ignore[arg-type]
    assert {name: value.item() for name, value in terms.items()} == {"a_term": 1, "b": 2}
    assert chain.cost() == {"stored_samples": 3}


def test_state_goes_to_the_strategy_it_came_from(chain: Chain) -> None:
    other = Chain({"b": Scale(0), "a": Scale(0)})
    other.load_state_dict(chain.state_dict())
    assert {name: s.number for name, s in other.strategies.items()} == {"a": 1, "b": 2}  # type: ignore[attr-defined]


def test_only_one_may_replace_the_task_loss_or_lay_out_stages() -> None:
    class Loss(Strategy):
        def task_loss(self, learner: Any, batch: Any, output: Any) -> torch.Tensor:
            return torch.tensor(7.0)

    class Stages(Strategy):
        def stages(self, learner: Any, experience: Any) -> list[Stage]:
            return [Stage("x")]

    with pytest.raises(ValueError, match="a and b cannot be combined: both replace the task loss"):
        Chain({"a": Loss(), "b": Loss()})
    with pytest.raises(ValueError, match="a and b cannot be combined: both lay out the training stages"):
        Chain({"a": Stages(), "b": Stages()})
    chain = Chain({"plain": Scale(1), "a": Loss(), "b": Stages()})
    assert chain.task_loss(None, {}, None).item() == 7  # type: ignore[arg-type, union-attr]
    assert [stage.name for stage in chain.stages(None, None)] == ["x"]  # type: ignore[arg-type]


def test_nobody_opens_a_door_by_default() -> None:
    chain = Chain({"a": Strategy()})
    for door in ("extend_batch", "forward", "task_loss", "loss", "edit_gradients", "after_step", "after_batch"):
        assert chain.open(door) == []
    assert chain.stages(None, None) == [Stage()]  # type: ignore[arg-type]


def test_rows_of_each_strategy_have_a_source_of_their_own() -> None:
    first, second = Strategy(), Strategy()
    learner = make_learner(TinyStream(1), {"a": first, "b": second})
    assert [learner.source_of(s) for s in (first, second)] == [1, 2]
