"""`protocol=tune_first`: what is tried, on which data, who shares it, and what the run makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import TINY, call, refused
from world import TinyStream

from clplatform.config import identity, untuned
from clplatform.protocol.tune_first import FirstExperiences, draw, trial_base
from clplatform.types import ClplatformError

TUNED = [*TINY, "strategy=ewc", "protocol=tune_first", "protocol.trials=3", "protocol.experiences=2"]


def config(**protocol: Any) -> dict[str, Any]:
    return {
        "seed": 1,
        "stream": {"seed": 5, "class_order": None},
        "optimizer": {"lr": 0.1},
        "strategy": {"a": {"_target_": "x", "strength": 2.0, "_tune_": {"strength": [1.0, 2.0, 4.0]}}},
        "protocol": {
            "name": "tune_first",
            "trials": 4,
            "experiences": 2,
            "seed": 9,
            "lr_factors": [1.0, 10.0],
            **protocol,
        },
    }


# -- what is tried -----------------------------------------------------------------------------------------------------


def test_the_first_trial_is_what_was_given_and_none_comes_twice() -> None:
    drawn = draw(config())
    assert drawn[0] == {"optimizer.lr": 0.1, "strategy.a.strength": 2.0}
    assert len(drawn) == 4
    assert len({json.dumps(d) for d in drawn}) == 4
    assert {d["optimizer.lr"] for d in draw(config(trials=100))} == {0.1, 1.0}
    assert len(draw(config(trials=100))) == 6  # all there are
    assert draw(config()) == drawn
    assert draw(config(seed=10)) != drawn


def test_trials_know_neither_the_run_s_seed_nor_its_class_order() -> None:
    one, other = config(), config()
    other["seed"], other["stream"]["seed"], other["stream"]["class_order"] = 2, 6, [1, 0]
    assert trial_base(one) == trial_base(other)
    assert trial_base(one)["seed"] == trial_base(one)["stream"]["seed"] == 9
    assert one["seed"] == 1


def test_a_trial_s_stream_is_the_beginning_and_has_no_test_data() -> None:
    stream = TinyStream(3)
    first = FirstExperiences(stream, 2)  # type: ignore[arg-type]
    assert len(first) == first.info.n_experiences == 2
    assert first.info.class_names == stream.info.class_names[:4]
    for shown, whole in zip(first, stream, strict=False):
        assert torch.equal(shown.train.labels, whole.train.labels)
        test = shown.test.fetch(torch.arange(len(shown.test)))["index"]
        assert torch.equal(test, whole.validation.fetch(torch.arange(len(whole.validation)))["index"])  # type: ignore[union-attr, arg-type]
    assert len(FirstExperiences(stream, 9)) == 3  # type: ignore[arg-type]


def test_without_validation_data_there_is_nothing_to_choose_by() -> None:
    from dataclasses import replace

    stream = TinyStream(2)
    stream.experiences[1] = replace(stream.experiences[1], validation=None)
    with pytest.raises(ClplatformError, match="which the experience 'e2' lacks; give stream.validation_fraction"):
        FirstExperiences(stream, 2)  # type: ignore[arg-type]


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_seeds_share_their_trials_and_run_with_what_did_best(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "-m", *TUNED, "seed=1,2", "hydra.sweep.dir=out")
    assert done.code == 0, done.err
    assert done.out.count("tuning ewc: trial") == 3  # of the first job only
    (record,) = Path("out/tuning").glob("*/tuning.json")
    tuning = json.loads(record.read_text())
    scores = [t["score"] for t in tuning["trials"]]
    best = tuning["trials"][scores.index(max(scores))]
    assert tuning["chosen"] == best["settings"]
    runs = sorted(p.parent for p in Path("out").glob("*/results.json"))
    assert len(runs) == 2
    for run in runs:
        used = yaml.safe_load((run / "config.yaml").read_text())
        assert used["optimizer"]["lr"] == best["settings"]["optimizer.lr"]
        assert used["strategy"]["ewc"]["strength"] == best["settings"]["strategy.ewc.strength"]
        record = json.loads((run / "results.json").read_text())
        assert record["protocol"]["chosen"] == tuning["chosen"]
        told = record["protocol"]["selection"]
        assert (told["trials"], told["failed"], told["given"], told["score"]) == (3, 0, scores[0], max(scores))
        assert told["seconds"] == pytest.approx(sum(t["seconds"] for t in tuning["trials"]))
        assert any(note.startswith("Tuned first: 3 trials on the first 2 experiences") for note in record["notes"])
        assert identity(used) == run.name  # so that the same command finds it again
        assert untuned(used)["strategy"]["ewc"]["strength"] == 1000.0
    compared = Path("out/comparison.md").read_text()
    (row,) = [line for line in compared.splitlines() if line.startswith("| ewc | 3 | 0 |")]
    assert f"{100 * scores[0]:.1f} % | {100 * max(scores):.1f} % | lr=" in row
    again = call(capsys, "-m", *TUNED, "seed=1,2", "hydra.sweep.dir=out")
    assert again.out.count("complete already") == 2
    assert "tuning ewc" not in again.out


def test_trials_that_are_there_are_not_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, *TUNED, "hydra.run.dir=out/a").code == 0
    (record,) = Path("out/tuning").glob("*/tuning.json")
    before = record.read_text()
    record.unlink()  # stopped before it was written
    times = {p: p.stat().st_mtime_ns for p in Path("out/tuning").rglob("results.json")}
    assert len(times) == 3
    assert call(capsys, *TUNED, "hydra.run.dir=out/b", "seed=4").code == 0
    assert json.loads(record.read_text()) == json.loads(before)
    assert times == {p: p.stat().st_mtime_ns for p in Path("out/tuning").rglob("results.json")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["seed=1000003"], "seed=1000003 is the seed of the trials (protocol.seed)"),
        (["stream.seed=1000003"], "stream.seed=1000003 is the seed of the trials"),
        (["protocol.trials=0"], "protocol.trials=0"),
        (["protocol.lr_factors=[0]"], "protocol.lr_factors"),
        (["+strategy.ewc._tune_.strenght=[1]"], "strategy.ewc._tune_.strenght"),
        (["strategy.ewc._tune_.strength=[-1]"], "strategy.ewc.strength=-1"),
    ],
)
def test_what_is_refused(settings: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *TUNED, *settings)
