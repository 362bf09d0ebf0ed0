from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from clplatform.tracking.heatmap import heat_map
from clplatform.tracking.logger import Matrix, RunContext


def context(metric: str = "accuracy", *, better: bool = True) -> RunContext:
    return RunContext(Path(), {}, "id", metric=metric, higher_is_better=better)


@pytest.mark.parametrize("n", [1, 5, 30])
def test_a_picture_of_any_matrix(n: int) -> None:
    matrix: Matrix = [[0.5 if j < i else None for j in range(n)] for i in range(n + 1)]
    picture = heat_map(matrix, context())
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert 200 <= picture.shape[0] <= 1000 and 300 <= picture.shape[1] <= 1200


def test_values_change_the_picture_and_empty_cells_do_not_fail() -> None:
    worse, better = (heat_map([[None, None], [v, None]], context()) for v in (0.1, 0.9))
    assert worse.shape == better.shape and (worse != better).any()
    assert heat_map([[None, None]], context()).size > 0
    assert heat_map([[math.inf, 12.5], [math.nan, 3e4]], context("perplexity", better=False)).size > 0


def test_pyplot_is_left_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    heat_map([[0.5]], context())
    assert plt.get_fignums() == before
