"""`clplatform diagnose` on finished runs: known answers for models that were broken on purpose, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, refused
from composed import BERT, text_stream
from safetensors.torch import load_file, save_file

from clplatform.diagnosis.diagnose import diagnose
from clplatform.files import read_json, write_json
from clplatform.saved import load
from clplatform.types import ClplatformError

Capture = pytest.CaptureFixture[str]
MLP = [
    "backbone=mlp", "backbone.hidden=[32,16]", "stream.n_experiences=2", "trainer.max_epochs=4", "threads=1",
    "trainer.accelerator=cpu", "tracking=local",
]  # fmt: skip
TEXT_RUN = ["trainer.max_epochs=2", "trainer.accelerator=cpu", "batch_size=16", "tracking=local", "threads=1"]
LM = [
    "stream=stdlib_text", "stream.domains=[manual,code]", "stream.limit=6000", "stream.max_length=16",
    "stream.tokenizer_vocab_size=300", "backbone=transformer_decoder", "backbone.size=16", "backbone.n_layers=1",
    "backbone.n_heads=2", "backbone.inner_size=16", "trainer.max_epochs=1", "+trainer.limit_train_batches=3",
    "trainer.accelerator=cpu", "tracking=local", "threads=1", "strategy=finetuning",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A finished run of the command line, made once for each name; a copy of it where it is asked to be changed."""
    from clplatform.cli import main

    root = tmp_path_factory.mktemp("runs")
    text = text_stream(root / "data")
    runs = {
        "cumulative": [*MLP, "strategy=cumulative", "trainer.max_epochs=6"],
        "finetuning": [*MLP, "strategy=finetuning", "keep_models=true"],
        "frozen": [*MLP, "strategy=finetuning", "backbone.freeze=all", "keep_models=true", "trainer.max_epochs=1"],
        "replay": [*MLP, "strategy=replay", "stream.n_experiences=5"],
        "icarl": [*MLP, "strategy=icarl"],
        "tasks": [*MLP, "strategy=finetuning", "stream.scenario=task_incremental", "head=multi", "keep_models=true"],
        "domains": [*MLP, "strategy=finetuning", "stream.scenario=domain_incremental"],
        "text": [*text, *BERT, *TEXT_RUN, "strategy=finetuning", "keep_models=true"],
        "language": [*LM, "keep_models=true"],
    }

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            assert main([*runs[name], f"hydra.run.dir={folder}"]) == 0
        return folder

    return make


@pytest.fixture
def copied(made: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return lambda name: Path(shutil.copytree(made(name), tmp_path / name))


def found(run: Path, *parts: str, **options: Any) -> dict[str, Any]:
    return read_json(diagnose(run, **({"parts": parts} if parts else {}), **options))  # type: ignore[arg-type]


def change_model(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = run / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


# -- known answers ---------------------------------------------------------------------------------------------------------


def test_a_scrambled_head_is_diagnosed_as_head_bias(copied: Callable[..., Path]) -> None:
    run = copied("cumulative")
    whole = found(run, "head_bias")["head_bias"]
    assert min(whole["now"]) > 0.8  # nothing is wrong with it
    assert whole["now"] == pytest.approx(read_json(run / "results.json")["matrix"][-1])

    def scramble(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("head.linear.weight", "head.linear.bias"):
            tensors[name] = tensors[name].roll(5, 0)  # of an old class what a new one had

    change_model(run, scramble)
    values = found(run)
    head = values["head_bias"]
    assert max(head["now"]) < 0.2
    assert 0.85 < head["share"] < 1.1
    assert head["bias"]["old_as_new"] > 0.8
    assert head["bias"]["margin_old"] < 0 < head["bias"]["margin_new"]
    assert "differ by up to" in values["notes"][0]  # it is not the model that the run has recorded
    (relearned,) = values["relearning"]["experiences"]
    assert relearned["again_start"] < 0.2


def test_destroyed_features_do_not_recover(copied: Callable[..., Path]) -> None:
    run = copied("cumulative")
    change_model(run, lambda tensors: tensors.update({n: 0 * v for n, v in tensors.items() if "layers.1" in n}))
    values = found(run, "head_bias", "drift")
    assert values["head_bias"]["share"] < 0.25
    assert values["head_bias"]["untrained_share"] > 0.5  # by features that still are some
    layers = values["drift"]["layers"]
    assert layers == ["layer 1", "layer 2", "features"]
    first, last, _ = values["drift"]["probe_final"]
    assert min(first) > 0.8
    assert max(last) < 0.35  # five classes


def test_a_backbone_that_does_not_change_has_a_similarity_of_one(made: Callable[..., Path]) -> None:
    run = made("frozen")
    drift = found(run, "drift")["drift"]
    for kind in ("linear", "unbiased"):
        assert [value for row in drift[f"cka_{kind}"] for value in row] == pytest.approx([1, 1, 1])
    assert drift["probe_then"] == drift["probe_final"] == drift["probe_untrained"]


def test_fine_tuning_moves_the_features(made: Callable[..., Path]) -> None:
    run = made("finetuning")
    values = found(run)
    drift = values["drift"]
    assert all(row[0] < 0.999 for row in drift["cka_unbiased"])
    assert drift["probe_then"] != drift["probe_final"]
    assert [row[1] for row in drift["probe_then"]] == [row[1] for row in drift["probe_final"]]
    assert values["head_bias"]["share"] > 0.3
    assert values["head_bias"]["bias"]["old_as_new"] > 0.9
    (row,) = values["relearning"]["experiences"]
    assert row["old"] == read_json(run / "results.json")["matrix"][1][0]
    assert row["again"] < row["scratch"]
    assert row["savings"] == pytest.approx(1 - row["again"] / row["scratch"])


def test_it_repeats_to_the_bit_and_leaves_the_run_alone(made: Callable[..., Path]) -> None:
    run = made("finetuning")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "diagnosis.json"}
    assert found(run) == found(run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "diagnosis.json"}


def test_every_experience_is_relearned_from_the_same_models(made: Callable[..., Path]) -> None:
    run = made("replay")
    rows = found(run, "relearning", level=1.0, steps=5)["relearning"]["experiences"]
    assert any(row["again"] != 0 for row in rows[:-1])  # the model was trained before the last one's turn
    now = read_json(run / "results.json")["matrix"][-1]
    assert [row["again_start"] for row in rows] == pytest.approx(now[:-1])
    assert all(row["scratch_start"] < 0.6 for row in rows)


# -- kinds of runs -----------------------------------------------------------------------------------------------------------


def test_kept_models_are_those_of_then(made: Callable[..., Path]) -> None:
    run = made("finetuning")
    first, last = (load(run / "models" / f"after_{k}").learner for k in (1, 2))
    assert (first.n_classes, last.n_classes) == (5, 10)
    final = load(run).learner
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), final.parameters(), strict=True))


def test_without_kept_models_it_says_what_is_missing(made: Callable[..., Path]) -> None:
    values = found(made("domains"))
    assert "keep_models=true" in values["drift"]["missing"]
    assert "cka_unbiased" not in values["drift"]
    assert values["drift"]["probe_then"][0][0] is None
    assert values["drift"]["probe_final"][0][0] > 0.5
    assert "no new classes" in values["head_bias"]["bias"]["left_out"]
    assert not values["relearning"]["experiences"][0]["first_kept"]


def test_task_ids_are_used(made: Callable[..., Path]) -> None:
    values = found(made("tasks"))
    run = read_json(made("tasks") / "results.json")
    assert values["head_bias"]["now"] == pytest.approx(run["matrix"][-1])
    assert "task is known" in values["head_bias"]["bias"]["left_out"]
    assert min(values["head_bias"]["refit"]) > 0.7
    assert values["drift"]["cka_unbiased"][0][0] < 0.9999


def test_prototypes_are_not_relearned_by_gradients(made: Callable[..., Path]) -> None:
    values = found(made("icarl"))
    assert "icarl answers with more than backbone and head" in values["relearning"]["left_out"]
    assert values["head_bias"]["now"] == pytest.approx(read_json(made("icarl") / "results.json")["matrix"][-1])


def test_a_text_run(made: Callable[..., Path]) -> None:
    values = found(made("text"), steps=3)
    assert values["drift"]["layers"] == ["embeddings", "block 1", "block 2", "features"]
    assert values["head_bias"]["now"] == pytest.approx(read_json(made("text") / "results.json")["matrix"][-1])
    assert values["drift"]["cka_unbiased"][1][0] is not None
    assert values["relearning"]["most"] == 3


def test_a_language_model_has_drift_and_relearning_but_no_head(made: Callable[..., Path]) -> None:
    values = found(made("language"), steps=2)
    assert "causal_lm" in values["head_bias"]["left_out"]
    assert "causal_lm" in values["drift"]["probes_left_out"]
    assert values["drift"]["layers"] == ["embeddings", "block 1", "features"]
    assert all(0 < row[0] <= 1 for row in values["drift"]["cka_linear"])
    (row,) = values["relearning"]["experiences"]
    assert row["target"] == pytest.approx(row["old"] / 0.9)
    assert row["again_start"] > 1


# -- parts and refusals --------------------------------------------------------------------------------------------------------


def test_parts_are_kept_from_an_earlier_diagnosis_of_the_same_run(copied: Callable[..., Path]) -> None:
    run = copied("finetuning")
    (run / "diagnosis.json").unlink(missing_ok=True)
    assert set(found(run, "drift")) & {"head_bias", "drift", "relearning"} == {"drift"}
    assert {"head_bias", "drift"} <= set(found(run, "head_bias"))
    values = read_json(run / "diagnosis.json")
    write_json(run / "diagnosis.json", {**values, "run_id": "another"})
    assert "drift" not in found(run, "head_bias")


def test_from_the_command_line(copied: Callable[..., Path], capsys: Capture) -> None:
    run = copied("finetuning")
    done = call(capsys, "diagnose", str(run), "--part", "head_bias", "--part", "drift", "--samples", "50")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(run / "report.html")
    assert read_json(run / "diagnosis.json")["options"]["samples"] == 50
    assert "of the forgetting is the head" in (run / "report.md").read_text()


def test_what_is_no_finished_run_is_refused(copied: Callable[..., Path], capsys: Capture) -> None:
    assert refused(capsys, "diagnose", "nowhere") == (
        "nowhere is not a run directory (no results.json and config.yaml in it)"
    )
    run = copied("finetuning")
    results = read_json(run / "results.json")
    write_json(run / "results.json", {**results, "status": "running"})
    assert "finish it with `clplatform resume" in refused(capsys, "diagnose", str(run))
    assert refused(capsys, "diagnose", str(run), "--samples", "0") == "diagnose: --samples 0: give 1 or more"
    assert "--level 1.5" in refused(capsys, "diagnose", str(run), "--level", "1.5")


def test_other_data_than_the_run_s_are_refused(
    copied: Callable[..., Path], made: Callable[..., Path], tmp_path: Path
) -> None:
    run = copied("text")
    data = made("text").parent / "data"
    config = run / "model" / "clplatform.json"
    shutil.copytree(data, tmp_path / "data")
    config.write_text(config.read_text().replace(str(data), str(tmp_path / "data")))
    assert "drift" in found(run, "drift")
    with (tmp_path / "data" / "train.csv").open("a") as file:
        file.write("one more,second,music\n")
    with pytest.raises(ClplatformError, match="is not what the run has learned: its samples differ"):
        diagnose(run)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ClplatformError, match="the run's data cannot be read again"):
        diagnose(run)


def test_a_configuration_from_elsewhere_builds_only_what_is_trusted(
    copied: Callable[..., Path], capsys: Capture
) -> None:
    run = copied("finetuning")
    path = run / "model" / "clplatform.json"
    path.write_text(path.read_text().replace("clplatform.backbone.mlp.", "own.backbone."))
    assert "which is not part of clplatform" in refused(capsys, "diagnose", str(run))
