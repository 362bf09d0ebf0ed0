"""From a configuration to objects, and what does not fit together: strategies, heads, streams, backbones, data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, refused
from hydra import compose, initialize_config_dir
from world import TinyStream

from clplatform.backbone.fit import FITTING
from clplatform.build import build_learner, build_strategies, build_stream, build_tokenizer, check_needs, make
from clplatform.config import conf_dir, resolved
from clplatform.memory.buffer import Buffer
from clplatform.strategy.base import Chain, Strategy
from clplatform.types import ClplatformError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLPLATFORM_DATA", raising=False)


# -- make ------------------------------------------------------------------------------------------------------------


def test_make_builds_nested_nodes_and_passes_objects_as_they_are() -> None:
    given = object()
    node = {
        "_target_": "builtins.dict",
        "buffer": {"_target_": "clplatform.memory.buffer.Buffer", "capacity": 3},
        "several": [{"_target_": "builtins.list"}, 4],
        "plain": {"a": 1},
    }
    made = make(node, given=given)
    assert isinstance(made["buffer"], Buffer) and made["buffer"].capacity == 3
    assert made["several"] == [[], 4] and made["plain"] == {"a": 1}
    assert made["given"] is given
    later = make({"_target_": "builtins.dict", "_partial_": True, "a": 1})
    assert isinstance(later, partial) and later(b=2) == {"a": 1, "b": 2}


def test_an_image_model_brings_no_tokenizer_to_a_text_stream() -> None:
    """Its folder is not even looked for: the backbone itself says that it does not read texts."""
    stream = {"_target_": "clplatform.stream.text.text_files"}
    backbone = {"_target_": "clplatform.backbone.huggingface.HuggingFaceImage", "pretrained": "./nowhere"}
    assert build_tokenizer({"stream": stream, "backbone": backbone}) is None
    text = {**backbone, "_target_": "clplatform.backbone.huggingface.HuggingFaceText"}
    with pytest.raises(ClplatformError, match="nowhere: there is no such folder"):
        build_tokenizer({"stream": stream, "backbone": text})


# -- strategies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategies", "reason"),
    [
        (
            "lora_experts,replay",
            "lora_experts cannot be combined with replay (replay): every experience trains an adapter and a classifier "
            "of its own",
        ),
        (
            "joint,lora_experts",
            "joint cannot be combined with lora_experts (expansion): one model is trained on all experiences at once",
        ),
        ("joint,cumulative", "joint and cumulative cannot be combined: each adds all earlier data"),
    ],
)
def test_excluded_combinations_say_why(strategies: str, reason: str, capsys: Capture) -> None:
    assert refused(capsys, "backbone=mlp", f"strategy=[{strategies}]") == f"strategy=[{strategies}]: {reason}"


class Stages(Strategy):
    def stages(self, learner: Any, experience: Any) -> list[Any]:
        return []


class Loss(Strategy):
    def task_loss(self, learner: Any, batch: Any, output: Any) -> Any:
        return output.logits.sum()


class Picky(Strategy):
    def __init__(self) -> None:
        raise ValueError("not on a Tuesday")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Stages", "Stages"], "a and b cannot be combined: both lay out the training stages, and only one may"),
        (["Loss", "Loss"], "a and b cannot be combined: both replace the task loss, and only one may"),
        (["Picky"], "strategy.a: not on a Tuesday"),
    ],
)
def test_what_strategies_refuse_is_told(names: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: globals()[name] for name in names}
    monkeypatch.setattr("clplatform.build.find", lambda target: found[target])
    config = {"strategy": {key: {"_target_": name} for key, name in zip("ab", names, strict=False)}}
    with pytest.raises(ClplatformError, match=message):
        build_strategies(config)


def test_what_is_no_strategy_is_refused(capsys: Capture) -> None:
    message = refused(capsys, "backbone=mlp", "strategy=finetuning", "strategy.finetuning._target_=builtins.dict")
    assert message == (
        "strategy.finetuning._target_=builtins.dict: not a strategy; derive it from clplatform.strategy.base.Strategy"
    )


# -- needs -------------------------------------------------------------------------------------------------------------

MINE = """
from clplatform.strategy.base import Strategy

class TaskIds(Strategy):
    needs = frozenset({"task_ids"})

class Transformer(Strategy):
    needs = frozenset({"transformer"})

class Pretrained(Strategy):
    needs = frozenset({"pretrained"})
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Strategies outside the package that need something: `task_ids`, `transformer`, `pretrained`."""
    (tmp_path / "needy_strategies.py").write_text(MINE)
    pages = tmp_path / "conf" / "strategy"
    pages.mkdir(parents=True)
    for name in ("TaskIds", "Transformer", "Pretrained"):
        (pages / f"{name.lower()}.yaml").write_text(f"{name.lower()}:\n  _target_: needy_strategies.{name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("needy_strategies", None)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (
            "taskids",
            [],
            "strategy=taskids needs task ids, but stream=split_digits (class_incremental) hides them at inference; choose "
            "stream.scenario=task_incremental",
        ),
        (
            "taskids",
            ["stream=permuted_digits"],
            "strategy=taskids needs task ids, but stream=permuted_digits (domain_incremental) hides them at inference; "
            "choose stream.scenario=task_incremental",
        ),
        (
            "transformer",
            ["backbone.name=vit_tiny"],  # a name does not make it one
            "strategy=transformer needs a Transformer, but backbone=vit_tiny is none; choose a Transformer backbone, such "
            "as vit_tiny",
        ),
        (
            "pretrained",
            [],
            "strategy=pretrained needs a pretrained backbone, but backbone=mlp has random weights; choose another or give "
            "backbone.pretrained=<folder>",
        ),
    ],
)
def test_a_strategy_says_what_it_lacks(strategy: str, settings: list[str], message: str, capsys: Capture) -> None:
    assert refused(capsys, "--config-dir", "conf", f"strategy={strategy}", "backbone=mlp", *settings) == message


def test_a_head_says_what_it_lacks(capsys: Capture) -> None:
    assert refused(capsys, "backbone=mlp", "head=multi") == (
        "head=multi needs task ids, but stream=split_digits (class_incremental) hides them at inference; choose "
        "stream.scenario=task_incremental"
    )


def test_boundaries_are_needed_where_a_strategy_works_at_them() -> None:
    class AtBoundaries(Strategy):
        needs = frozenset({"boundaries"})

    chain, info = Chain({"x": AtBoundaries()}), TinyStream().info
    config: dict[str, Any] = {
        "backbone": {"name": "mlp", "_target_": "clplatform.backbone.mlp.MLP"},
        "head": {"_target_": "clplatform.head.linear.LinearHead"},
    }
    check_needs(chain, info, config)
    with pytest.raises(ClplatformError, match=r"strategy=x needs task boundaries, but stream=tiny .* has none"):
        check_needs(chain, replace(info, boundaries=False), config)


# -- numbers that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("stream.n_experiences=0", ": a stream has at least one experience"),
        (
            "stream.n_experiences=20",
            ": the 10 classes of digits cannot be dealt evenly to so many experiences; possible are 1, 2, 5, 10",
        ),
        (
            "stream.n_experiences=3",
            ": the 10 classes of digits cannot be dealt evenly to so many experiences; possible are 1, 2, 5, 10",
        ),
        (
            "strategy.replay.capacity=9",
            " is smaller than the 10 classes of stream=split_digits; give it 10 or more",
        ),
        ("backbone.freeze=9", ": the backbone has 1 blocks after its first part; give 0 … 1, or all"),
    ],
)
def test_numbers_that_do_not_fit(setting: str, reason: str, capsys: Capture) -> None:
    assert refused(capsys, "backbone=mlp", setting) == setting + reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("optimizer.lr=-1", "Invalid learning rate: -1"),
        ("optimizer.weight_decay=-1", "Invalid weight_decay value: -1"),
        ("optimizer.betas=[2,3]", "Invalid beta parameter at index 0: 2"),
        ("optimizer=sgd optimizer.momentum=-1", "Invalid momentum value: -1"),
        ("optimizer=sgd optimizer.nesterov=true", "Nesterov momentum requires a momentum and zero dampening"),
        ("optimizer._partial_=false", "AdamW.__init__() missing 1 required positional argument: 'params'"),
    ],
)
def test_what_the_optimizer_refuses(settings: str, reason: str, capsys: Capture) -> None:
    message = refused(capsys, "backbone=mlp", *settings.split())
    assert message == f"optimizer: {reason}; see optimizer.* in `clplatform --cfg job`"


def test_early_stopping_needs_validation(capsys: Capture) -> None:
    assert refused(capsys, "backbone=mlp", "early_stopping=2", "stream.validation_fraction=0") == (
        "early_stopping=2 needs a validation split, which the experience '0 1' lacks; give "
        "stream.validation_fraction=0.1, or early_stopping=null"
    )
    assert refused(capsys, "backbone=mlp", "early_stopping=2", "+trainer.limit_val_batches=0") == (
        "early_stopping=2 needs validation: leave out trainer.limit_val_batches=0"
    )


# -- data and models that are missing or of another kind ---------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """A text stream of four classes."""
    rows = ["text,label", *(f"word{k} and {i},class{k}" for k in range(4) for i in range(8))]
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("\n".join(rows))
    return ["stream=text_files", "stream.train=train.csv", "stream.test=test.csv", "stream.n_experiences=2"]


@pytest.mark.parametrize("backbone", ["mlp", "vit_tiny", "vit_b16"])
def test_an_image_backbone_does_not_read_texts(backbone: str, texts: list[str], capsys: Capture) -> None:
    assert refused(capsys, *texts, f"backbone={backbone}") == (
        f"backbone={backbone} reads images, but the stream is made of texts; choose backbone={FITTING['text']}"
    )


@pytest.mark.parametrize("backbone", ["bert_tiny", "distilbert"])
def test_a_text_backbone_does_not_read_images(backbone: str, capsys: Capture) -> None:
    assert refused(capsys, f"backbone={backbone}") == (
        f"backbone={backbone} reads texts, but the stream is made of images; choose backbone={FITTING['image']}"
    )


def test_data_that_is_missing_says_what_to_get_and_where_to_put_it(capsys: Capture) -> None:
    assert refused(capsys, "backbone=bert_tiny", "stream=clinc150") == (
        "the data set clinc150 is not here: put data_full.json (and domains.json) into a folder and give "
        "stream.data_dir=<folder>, or into $CLPLATFORM_DATA/clinc150"
    )
    assert refused(capsys, "backbone=bert_tiny", "stream=banking77") == (
        "the data set banking77 is not here: put train.csv and test.csv (columns text, category) into a folder and give "
        "stream.data_dir=<folder>, or into $CLPLATFORM_DATA/banking77"
    )
    assert refused(capsys, "backbone=mlp", "stream=split_tinyimagenet") == (
        "the data set tiny_imagenet is not here: put the unpacked tiny-imagenet-200 (with wnids.txt in it) into a folder "
        "and give stream.data_dir=<folder>, or into $CLPLATFORM_DATA/tiny_imagenet"
    )
    assert refused(capsys, "backbone=mlp", "stream=split_mnist", "stream.data_dir=nowhere") == (
        "stream.data_dir=nowhere: there is no such folder"
    )
    Path("empty").mkdir()
    assert refused(capsys, "backbone=mlp", "stream=split_mnist", "stream.data_dir=empty") == (
        "empty lacks train-images-idx3-ubyte (or train-images-idx3-ubyte.gz): put the four IDX files of the data set there"
    )


def test_files_that_are_missing(texts: list[str], capsys: Capture) -> None:
    assert refused(capsys, *texts, "backbone=bert_tiny", "stream.train=nowhere.csv") == "there is no file nowhere.csv"
    assert refused(capsys, *texts, "backbone=bert_tiny", "stream.n_experiences=null").startswith(
        "stream.n_experiences is missing"
    )
    assert refused(capsys, *texts, "backbone=distilbert", "backbone.pretrained=./nowhere") == (
        "backbone.pretrained=./nowhere: there is no such folder"
    )


def test_weights_depend_on_the_seed_alone() -> None:
    def first_layer(seed: int, disturbance: int) -> torch.Tensor:
        torch.manual_seed(disturbance)
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = resolved(compose("run", [*TINY, f"seed={seed}"]))
        learner = build_learner(config, build_stream(config).info, build_strategies(config))
        return next(learner.backbone.parameters()).detach()

    assert torch.equal(first_layer(0, 1), first_layer(0, 2))
    assert not torch.equal(first_layer(0, 1), first_layer(1, 1))
