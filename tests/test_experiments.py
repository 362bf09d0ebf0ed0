"""The pages of `conf/experiment/`: all can be composed, and those that need no data set run, with little text."""

from __future__ import annotations

from pathlib import Path

import pytest
from composed import configuration, trained

from clplatform.config import check, conf_dir, drop_ghosts
from clplatform.files import read_json

LITTLE = [
    "stream.limit=4000",
    "stream.tokenizer_vocab_size=300",
    "stream.max_length=32",
    "backbone.size=16",
    "threads=1",
]


@pytest.mark.parametrize("name", sorted(page.stem for page in (conf_dir() / "experiment").glob("*.yaml")))
def test_every_page_is_possible(name: str) -> None:
    config = configuration(f"experiment={name}")
    drop_ghosts(config, {page.stem for page in (conf_dir() / "strategy").glob("*.yaml")}, [])
    check(config)
    assert config["name"] == name


@pytest.mark.parametrize(
    "settings",
    [
        ["experiment=quickstart_text", "backbone.inner_size=16"],
        ["experiment=pretrain_lm"],
        ["experiment=pretrain_lm", "stream.problem=masked_lm", "backbone=transformer_text"],
    ],
)
def test_pages_without_a_data_set_run(tmp_path: Path, settings: list[str]) -> None:
    made = trained(tmp_path / "run", *settings, *LITTLE)
    assert made.results.status == "completed"
    perplexity = read_json(tmp_path / "run" / "results.json")["scores"]["perplexity"]
    assert len(perplexity[0]) == made.learner.info.n_experiences
    assert perplexity[-1][-1] < perplexity[0][-1], "something was learned"
