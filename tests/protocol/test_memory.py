"""`budget.bytes`: what strategies keep beside the model is equal, whatever they keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import TINY, call, only_run, refused
from world import TinyStream

from clplatform.data import TensorData
from clplatform.protocol.memory import FEW, few
from clplatform.results import Results
from clplatform.strategy.base import Strategy, n_bytes

Capture = pytest.CaptureFixture[str]
MOST = 50_000


def kept(folder: Path) -> int:
    return n_bytes(json.loads((folder / "results.json").read_text())["cost"])


@pytest.mark.parametrize("strategy", ["replay", "derpp", "gdumb", "icarl", "bic", "cls_er", "der_net", "[replay,lwf]"])
def test_what_is_kept_is_as_much_as_fits(strategy: str, capsys: Capture) -> None:
    """Samples, samples with logits, with the initial weights, teachers, averages or columns beside them."""
    done = call(capsys, *TINY, f"strategy={strategy}", f"budget.bytes={MOST}")
    assert done.code == 0, done.err
    found = json.loads((only_run() / "results.json").read_text())
    ((name, capacity),) = found["budget"]["capacity"].items()
    each = found["cost"]["buffer_bytes"] / capacity
    assert MOST - each - 1 < kept(only_run()) <= MOST
    assert capacity != yaml.safe_load((only_run() / "config.yaml").read_text())["strategy"][name]["capacity"]
    assert f"{name}: {capacity} samples" in (only_run() / "report.md").read_text()


def test_a_sample_with_its_logits_takes_more(capsys: Capture) -> None:
    sizes = {}
    done = call(capsys, "-m", *TINY, "strategy=replay,derpp,ewc", f"budget.bytes={MOST}")
    assert done.code == 0, done.err
    for path in Path("multirun/default").glob("*/results.json"):
        found = json.loads(path.read_text())
        sizes[found["strategy"][0]] = found["budget"].get("capacity")
    assert sizes["derpp"]["derpp"] < sizes["replay"]["replay"]
    assert sizes["ewc"] is None
    text = Path("multirun/default/comparison.md").read_text()
    assert "Equal budget: at most 48.8 KiB beside the model." in text
    assert "kept beside the model" in text


def test_a_run_that_goes_on_keeps_its_capacity(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from clplatform.experiment import Experiment

    learn = Experiment._learn

    def kill(self: Any, experience: Any, *, resume: bool) -> None:
        if experience.index == 1 and type(self) is Experiment:
            raise KeyboardInterrupt
        learn(self, experience, resume=resume)

    monkeypatch.setattr(Experiment, "_learn", kill)
    assert call(capsys, *TINY, "strategy=replay", f"budget.bytes={MOST}").code == 130
    monkeypatch.setattr(Experiment, "_learn", learn)
    before = Results.load(only_run()).budget
    monkeypatch.setattr("clplatform.protocol.memory.fit_capacity", lambda *_: pytest.fail("measured again"))
    done = call(capsys, "resume", str(only_run()))
    assert done.code == 0, done.err
    assert Results.load(only_run()).budget == before
    assert MOST - 200 < kept(only_run()) <= MOST
    assert call(capsys, "predict", str(only_run()), "--help").code == 0


@pytest.mark.parametrize(
    ("strategy", "most", "said"),
    [
        ("ewc", 5000, "strategy=ewc keeps 9680 bytes beside the model, more than budget.bytes=5000"),
        ("[replay,lwf]", 4000, "strategy=lwf keeps 4840 bytes beside the model, more than budget.bytes=4000"),
        (
            "replay",
            800,
            "has room for 9 samples of strategy=replay (88 B each), and stream=split_digits has 10 classes",
        ),
        ("gdumb", 5000, "beside the 4.1 KiB of what else is kept"),
    ],
)
def test_too_little_is_refused_by_name_before_training(strategy: str, most: int, said: str, capsys: Capture) -> None:
    settings = ["backbone=mlp", "backbone.hidden=[16]", "stream.n_experiences=2", "tracking=local"]
    assert said in refused(capsys, *settings, f"strategy={strategy}", f"budget.bytes={most}")


def test_a_refusal_says_what_is_enough(capsys: Capture) -> None:
    said = refused(capsys, *TINY, "strategy=gdumb", "budget.bytes=4500")
    enough = int(said.rpartition("give it ")[2].split()[0])
    assert call(capsys, *TINY, "strategy=gdumb", f"budget.bytes={enough}").code == 0
    assert "room for 9" in refused(capsys, *TINY, "strategy=gdumb", f"budget.bytes={enough - 1}")


def test_directions_keep_the_capacity_they_were_given(capsys: Capture) -> None:
    """Each of ogd's is as large as the model: 1,210 numbers."""
    done = call(capsys, *TINY, "strategy=ogd", "strategy.ogd.capacity=10", f"budget.bytes={10 * 1210 * 4}")
    assert done.code == 0, done.err
    assert kept(only_run()) <= 10 * 1210 * 4
    assert "strategy=ogd keeps" in refused(capsys, *TINY, "strategy=ogd", f"budget.bytes={MOST}")


def test_what_grows_in_training_ends_the_run_and_is_not_recorded(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clplatform.strategy.finetuning import Finetuning

    def cost(self: Strategy) -> dict[str, int | float]:
        return {"extra_parameters": self.n if hasattr(self, "n") else 0}

    def after_step(self: Any, learner: Any) -> None:
        self.n = learner.steps

    monkeypatch.setattr(Finetuning, "cost", cost)
    monkeypatch.setattr(Finetuning, "after_step", after_step)
    done = call(
        capsys, *TINY, "strategy=finetuning", "budget.bytes=13"
    )  # a step in each experience of the sketch: 8 bytes
    assert (
        "strategy=finetuning keeps 16 bytes beside the model after experience 2, more than budget.bytes=13" in done.err
    )
    assert done.code == 2
    found = Results.load(only_run())
    assert (found.status, len(found.timing)) == ("failed", 1)
    assert "keeps 16 bytes" in call(capsys, "resume", str(only_run())).err  # and does not end well by being asked twice


def test_a_few_samples_have_every_class_and_the_longest_text() -> None:
    n = 500
    labels = torch.zeros(n, dtype=torch.int64)
    labels[77] = 1
    mask = torch.zeros(n, 9, dtype=torch.int64)
    mask[:, :3], mask[401] = 1, 1
    columns = {"labels": labels, "task_labels": labels, "index": torch.arange(n), "attention_mask": mask}
    chosen = few(TensorData({**columns, "input_ids": mask}))
    assert len(chosen) <= FEW + 6
    assert set(chosen.labels.tolist()) == {0, 1}
    assert chosen.fetch(torch.arange(len(chosen)))["input_ids"].shape[1] == 9
    assert len(few(TinyStream(1)[0].train)) == 32
