"""Patches that fit an image."""

from __future__ import annotations

import pytest

from clplatform.backbone.fit import fit_patches


@pytest.mark.parametrize(
    ("size", "expected"), [(8, (2, 8)), (28, (4, 28)), (32, (4, 32)), (64, (8, 64)), (31, (4, 32)), (1, (2, 2))]
)
def test_examples(size: int, expected: tuple[int, int]) -> None:
    assert fit_patches(size) == expected


def test_at_most_64_patches_that_cover_the_image() -> None:
    for size in range(1, 257):
        patch, enlarged = fit_patches(size)
        assert patch >= 2
        assert enlarged % patch == 0
        assert enlarged // patch <= 8
        assert size <= enlarged < size + patch
