"""Devices, precisions and Trainer settings that this machine or Lightning cannot serve."""

from __future__ import annotations

import pytest
import torch
from command import refused

Capture = pytest.CaptureFixture[str]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SEE = "(see trainer.* in `clplatform --cfg job`)"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("trainer.accelerator=banana", "You selected an invalid accelerator name: `accelerator='banana'`."),
        ("+trainer.strategy=banana", "You selected an invalid strategy name: `strategy='banana'`."),
        ("trainer.devices=0", "`Trainer(devices=0)` value is not a valid input using cpu accelerator."),
        ("+trainer.limit_train_batches=1.5", "You have passed invalid value 1.5 for limit_train_batches"),
        ("trainer.precision=transformer-engine", "Requirement 'transformer_engine"),
    ],
)
def test_what_lightning_refuses(setting: str, reason: str, capsys: Capture) -> None:
    accelerator = [] if "accelerator" in setting else ["trainer.accelerator=cpu"]
    message = refused(capsys, "backbone=mlp", *accelerator, setting)
    assert message.startswith(f"trainer: {reason}")
    assert message.endswith(SEE)


def test_a_precision_that_would_be_replaced_by_another(capsys: Capture) -> None:
    message = refused(capsys, "backbone=mlp", "trainer.accelerator=cpu", "trainer.precision=16-mixed")
    assert "AMP with fp16 is not supported on CPU" in message


@without_gpu
def test_an_accelerator_that_is_not_there(capsys: Capture) -> None:
    message = refused(capsys, "backbone=mlp", "trainer.accelerator=cuda")
    assert message.startswith("trainer: `CUDAAccelerator` can not run on your system")
    assert refused(capsys, "backbone=mlp", "trainer.accelerator=gpu").startswith("trainer: No supported gpu backend")


@pytest.mark.parametrize("setting", ["trainer.devices=2", "+trainer.num_nodes=2 +trainer.strategy=ddp"])
def test_a_run_has_one_process(setting: str, capsys: Capture) -> None:
    message = refused(capsys, "backbone=mlp", "trainer.accelerator=cpu", *setting.split())
    assert "a run trains on one device: give trainer.devices=1" in message


def test_a_memory_s_device(capsys: Capture) -> None:
    message = refused(capsys, "backbone=mlp", "strategy.replay.device=cud")
    assert message.startswith("strategy.replay.device=cud: Expected one of cpu, cuda, ")
    assert message.endswith("device string: cud; cpu is always there")


@without_gpu
def test_a_memory_s_device_that_is_not_there(capsys: Capture) -> None:
    message = refused(capsys, "backbone=mlp", "strategy.replay.device=cuda")
    assert message.startswith("strategy.replay.device=cuda: ")
    assert message.endswith("; cpu is always there")
