"""Tunings as settings: runs, records, saved models, what is refused, and configurations from before there were any."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from command import call, only_run, refused
from composed import BERT, SMALL, VIT, configuration, text_stream, trained
from tuned import NAMES

from clplatform import build
from clplatform.config import check, conf_dir, identity
from clplatform.files import read_json, write_json
from clplatform.saved import load
from clplatform.types import ClplatformError

Capture = pytest.CaptureFixture[str]

DIGITS = [*VIT, "stream.n_experiences=2", "strategy=finetuning"]


def test_the_quickstart_with_lora(capsys: Capture) -> None:
    done = call(capsys, *SMALL, "threads=1", "stream.n_experiences=2", "tuning=lora", "tuning.rank=2")
    assert done.code == 0, done.err
    run = only_run()
    record = read_json(run / "results.json")
    n = 4 * 2 * 2 * 2 * 64  # layers, queries and values, A and B, rank and size
    kept = {key: record["backbone"][key] for key in ("tuning", "trainable_parameters", "trainable_bytes")}
    assert kept == {"tuning": "lora", "trainable_parameters": n, "trainable_bytes": 4 * n}
    assert record["backbone"]["parameters"] > 10 * n
    assert any("tuning=lora keeps the backbone's weights, which are random" in note for note in record["notes"])
    page = (run / "report.html").read_text()
    assert "lora" in page
    assert "2.0 k trainable (8.0 KiB)" in page


def test_a_record_of_a_whole_backbone_says_so(capsys: Capture) -> None:
    done = call(capsys, *SMALL, *DIGITS, "threads=1")
    assert done.code == 0, done.err
    backbone = read_json(only_run() / "results.json")["backbone"]
    assert backbone["tuning"] == "full"
    assert backbone["trainable_parameters"] == backbone["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_answers_as_the_trained_one(name: str, tmp_path: Path) -> None:
    run = trained(tmp_path, *DIGITS, f"tuning={name}")
    batch = run.stream[1].test.fetch(torch.arange(20))
    with torch.inference_mode():
        expected = run.learner(batch).logits
    assert torch.equal(load(tmp_path).logits(batch["pixel_values"].numpy()), expected)


@pytest.mark.parametrize("name", ["dora", "prefix", "prompt"])
def test_a_saved_text_model_answers_as_the_trained_one(name: str, tmp_path: Path) -> None:
    settings = [*BERT, *text_stream(tmp_path / "data"), f"tuning={name}", "strategy=[replay,lwf]"]
    run = trained(tmp_path, *settings)
    texts = ["book a flight to paris", "play some jazz"]
    predictor = load(tmp_path)
    batch = {**predictor._columns(texts), "task_labels": torch.zeros(2, dtype=torch.int64)}
    with torch.inference_mode():
        expected = run.learner(batch).logits
    assert torch.equal(predictor.logits(texts), expected)


def test_a_saved_model_of_before_there_were_tunings_is_loaded(tmp_path: Path) -> None:
    run = trained(tmp_path, *DIGITS, "tuning=full")
    batch = run.stream[1].test.fetch(torch.arange(20))
    description = read_json(tmp_path / "model" / "clplatform.json")
    del description["config"]["tuning"]
    write_json(tmp_path / "model" / "clplatform.json", description)
    with torch.inference_mode():
        expected = run.learner(batch).logits
    assert torch.equal(load(tmp_path).logits(batch["pixel_values"].numpy()), expected)


def test_is_part_of_a_job_s_identity_and_full_is_what_was_before() -> None:
    full, lora, other = (
        configuration(*DIGITS, *more) for more in (["tuning=full"], ["tuning=lora"], ["tuning=lora", "tuning.rank=4"])
    )
    assert len({identity(c) for c in (full, lora, other)}) == 3
    before = copy.deepcopy(full)
    del before["tuning"]
    check(before)
    assert identity(before) == identity(full)


def test_a_page_says_which_learning_rate_suits_it() -> None:
    def lr(*settings: str) -> float:
        return configuration(*settings)["optimizer"]["lr"]

    assert lr("backbone=minilm", "strategy=replay") == lr("backbone=minilm", "tuning=full") == 0.0001
    assert lr("backbone=minilm", "tuning=ia3") == 0.003
    assert lr("backbone=minilm", "tuning=ia3", "tuning.lr=0.02") == 0.02
    assert lr("backbone=minilm", "tuning=ia3", "optimizer.lr=0.5") == 0.5
    assert lr() == 0.001


def test_the_weights_that_full_starts_with_are_those_of_before() -> None:
    """A tuning draws after the backbone."""
    config = configuration(*DIGITS)
    stream, chain = build.build_stream(config), build.build_strategies(config)
    full = build.build_learner(config, stream.info, chain).backbone.state_dict()
    tuned = configuration(*DIGITS, "tuning=adapter")
    adapted = build.build_learner(tuned, stream.info, build.build_strategies(tuned)).backbone.state_dict()
    assert all(torch.equal(adapted[n], t) for n, t in full.items())


def test_the_recipe_compares_tunings_that_there_are() -> None:
    page = yaml.safe_load((conf_dir() / "experiment" / "clinc150_peft.yaml").read_text())
    names = page["hydra"]["sweeper"]["params"]["tuning"].split(",")
    assert {*names} <= {"full", *NAMES}
    for name in names:
        config = configuration("experiment=clinc150_peft", f"tuning={name}", "seed=2")
        check(config)
        assert (config["backbone"]["name"], config["stream"]["name"], [*config["strategy"]]) == (
            "minilm",
            "clinc150",
            ["replay"],
        )
        assert config["stream"]["seed"] == 2
        assert config["optimizer"]["lr"] == config["tuning"].get("lr", 0.0001)


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tuning=loar"], "tuning=loar: there is no such tuning; did you mean lora?"),
        (["tuning=null"], "tuning=null: choose a page of tuning by its name; see `clplatform list` for tuning"),
        (["tuning=lora", "tuning.rnk=4"], "tuning.rnk=4: there is no such setting; did you mean rank?"),
        (["tuning=lora", "+tuning.rnk=4"], "tuning.rnk: there is no such setting; did you mean rank?"),
        (["tuning=lora", "tuning.rank=0"], "tuning.rank=0: input should be greater than or equal to 1"),
        (["tuning=lora", "tuning.targets=k"], "tuning.targets=k: input should be 'q', 'v', 'qv', 'qkv' or 'all'"),
        (["tuning=full", "+tuning.rank=4"], "tuning.rank: there is no such setting; it has none"),
        (["tuning=bitfit", "backbone.freeze=1"],
         "backbone.freeze=1: tuning=bitfit freezes the backbone already; leave it at none"),
        (["tuning=prompt", "backbone=mlp"],
         "tuning=prompt cannot give soft prompts to this backbone: it is no Hugging Face Transformer; choose one, such as "
         "vit_b16 or minilm"),
        *(([f"strategy={name}", "tuning=lora", "stream.scenario=task_incremental"],
           f"strategy={name} ({family}) has parts, copies or masks of its own and says itself what is trained: it cannot be "
           "combined with tuning=lora; leave tuning=full")
          for name, family in (("lora_experts", "expansion"), ("o_lora", "expansion"), ("inf_lora", "expansion"),
                               ("adapters", "expansion"), ("progressive_prompts", "prompt"), ("hat", "isolation"))),
    ],
)  # fmt: skip
def test_refused(settings: list[str], message: str, capsys: Capture) -> None:
    assert refused(capsys, *SMALL, "threads=1", *settings) == message


def test_what_is_no_tuning_is_refused() -> None:
    config = {**configuration(*DIGITS), "tuning": {"_target_": "torch.nn.Identity"}}
    message = r"tuning\._target_=torch\.nn\.Identity: not a tuning; derive it from clplatform\.tuning\.base\.Tuning"
    with pytest.raises(ClplatformError, match=message):
        build.build_tuning(config)
