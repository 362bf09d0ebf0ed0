"""What plugins do to predictions is saved with the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from avalanche_cases import CASES
from avalanche_world import hosted, hosting
from safetensors.torch import load_model, save_model

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own

CHANGED = ["BiCPlugin", "CoPEPlugin", "_ICaRLPlugin and ICaRLLossPlugin", "MemoryNCMUpdate", "FeCAMOracle"]


@pytest.mark.parametrize("name", CHANGED)
def test_a_saved_model_predicts_as_the_trained_one(name: str, tmp_path: Path) -> None:
    run = hosting(tmp_path / "run", CASES[name])
    run.run()
    x = torch.cat([e.test.fetch(torch.arange(16))["pixel_values"] for e in run.stream])
    batch = {"pixel_values": x, "task_labels": torch.zeros(len(x), dtype=torch.int64)}
    with torch.inference_mode():
        expected = run.learner.eval()(batch).logits
        bare = run.learner.run(batch).logits
    assert not torch.equal(expected, bare)  # the plugin does something
    save_model(run.learner, str(tmp_path / "model.safetensors"))

    again = hosting(tmp_path / "again", CASES[name]).learner
    for experience in run.stream:
        again.build(experience.info)
    load_model(again, str(tmp_path / "model.safetensors"))
    with torch.inference_mode():
        assert torch.equal(again.eval()(batch).logits, expected)


def test_a_saved_model_carries_no_samples(tmp_path: Path) -> None:
    run = hosting(tmp_path, CASES["MemoryNCMUpdate"])
    run.run()
    assert len(hosted(run).made[0].storage_policy.buffer) == 20
    x = run.stream[0].train.fetch(torch.arange(32))["pixel_values"].flatten(1)
    content = run.learner.extras["avalanche"].content.numpy().tobytes()
    assert not any(sample.numpy().tobytes() in content for sample in x)


def test_without_such_a_plugin_nothing_is_added(tmp_path: Path) -> None:
    run = hosting(tmp_path, CASES["EWCPlugin"])
    run.run()
    assert len(run.learner.extras) == 0
