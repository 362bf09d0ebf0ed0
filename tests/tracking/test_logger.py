from __future__ import annotations

import math

import pytest
import torch

from clplatform.tracking.logger import finite, scalars


def test_scalars_takes_numbers_and_tensors_in_one_transfer_per_device() -> None:
    mixed = {"a": 1, "b": torch.tensor(0.5), "c": torch.tensor([2]), "d": 0.25, "e": torch.tensor(math.nan)}
    values = scalars(mixed)
    assert list(values) == list(mixed)
    assert [values[k] for k in "abcd"] == [1.0, 0.5, 2.0, 0.25] and math.isnan(values["e"])
    assert all(type(v) is float for v in values.values())
    with pytest.raises(ValueError, match=r"f: only single numbers can be logged, not a tensor of shape \[2\]"):
        scalars({"f": torch.zeros(2)})


def test_scalars_synchronises_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a value was fetched by itself"))
    assert scalars({str(i): torch.tensor(float(i)) for i in range(8)})["7"] == 7.0
    assert len(calls) == 1


def test_finite() -> None:
    assert [finite(v) for v in (None, math.nan, math.inf, 0.0, 1)] == [False, False, False, True, True]
