"""docs/avalanche_plugins.md says what the tests hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from avalanche_cases import CASES

PAGE = Path(__file__).parents[2] / "docs" / "avalanche_plugins.md"


def table() -> str:
    """The table of the page."""
    same = {"identical": "identical", "close": "close", "no": "–"}
    resume = {"inside": "inside", "repeats": "repeats the experience", "no": "–"}
    texts = {"identical": "identical", "no": "–"}
    rows = ["| plugin | weights and predictions | of texts | a stopped run goes on | |", "|---|---|---|---|---|"]
    for name, case in CASES.items():
        verdict = "close" if case.same == "close" else texts[case.texts]
        rows.append(f"| {name} | {same[case.same]} | {verdict} | {resume[case.resume]} | {case.remark} |")
    return "\n".join(rows)


@pytest.mark.skipif(not PAGE.is_file(), reason="not in a checkout")
def test_the_page_has_this_table() -> None:
    assert table() in PAGE.read_text(), f"put this into {PAGE.name}:\n\n{table()}"


@pytest.mark.filterwarnings("ignore")
def test_every_plugin_that_is_shipped_is_in_the_table() -> None:
    from clplatform.avalanche_host.plugins import catalogue

    listed = {word for name in CASES for word in name.replace(",", " ").split()}
    shipped = {c.__name__ for c in catalogue().values()}
    assert shipped <= listed
    assert len(shipped) >= 30
