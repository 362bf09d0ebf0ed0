"""Settings that are refused before anything is built, as the command line refuses them; and the identity of a job."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import refused
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clplatform.build import build_strategy
from clplatform.config import check, conf_dir, drop_ghosts, identity, resolved
from clplatform.types import ClplatformError

Capture = pytest.CaptureFixture[str]


def lines(text: str) -> list[tuple[str, str]]:
    """`settings → message`, a line each; continuation lines are indented."""
    joined = text.strip().replace("\n    ", " ")
    return [(a.strip(), b.strip()) for a, b in (line.split("→") for line in joined.splitlines())]


# -- names -----------------------------------------------------------------------------------------------------------

UNKNOWN = lines("""
sed=3 → sed=3: there is no such setting; did you mean seed?
+sed=3 → sed: there is no such setting; did you mean seed?
++batchsize=3 → batchsize: there is no such setting; did you mean batch_size?
experiments=split_mnist_mlp → experiments=split_mnist_mlp: there is no such setting; did you mean experiment?
stream.nexperiences=5 → stream.nexperiences=5: there is no such setting; did you mean n_experiences?
backbone.dropot=0.1 → backbone.dropot=0.1: there is no such setting; did you mean dropout?
++backbone.dropot=0.1 → backbone.dropot: there is no such setting; did you mean dropout?
head.bias=1 → head.bias=1: there is no such setting; it has none
optimizer.weightdecay=1 → optimizer.weightdecay=1: there is no such setting; did you mean weight_decay?
optimizer.eps=1 → optimizer.eps=1: the page has no such setting; if the optimizer has it, add it with
    +optimizer.eps=1
scheduler.warmpu=1 → scheduler.warmpu=1: there is no such setting; did you mean warmup?
trainer.max_epoch=1 → trainer.max_epoch=1: there is no such setting; did you mean max_epochs?
trainer.fast_dev_run=true → trainer.fast_dev_run=true: the page has no such setting; if Lightning's Trainer has it, add
    it with +trainer.fast_dev_run=true
tracking.modes=x → tracking.modes=x: there is no such setting; did you mean mode?
checkpoint.every_minuts=3 → checkpoint.every_minuts=3: there is no such setting; did you mean every_minutes?
strategy.replay.capactiy=3 → strategy.replay.capactiy=3: there is no such setting; did you mean capacity?
strategy=[replay,ewc] ++strategy.ewc.strenght=3 → strategy.ewc.strenght: there is no such setting; did you mean
    strength?
strategy.ewcc.strength=3 → strategy.ewcc.strength=3: there is no such setting; did you mean ewc?
++strategy.ewcc.strength=3 → strategy.ewcc: there is no such strategy; did you mean ewc?
""")


@pytest.mark.parametrize(("settings", "message"), UNKNOWN)
def test_an_unknown_setting_is_refused(settings: str, message: str, capsys: Capture) -> None:
    assert refused(capsys, "backbone=mlp", *settings.split()) == message


ADDED = lines("""
scheduler.warmpu=1 → scheduler.warmpu: there is no such setting; did you mean warmup?
head.bias=1 → head.bias: there is no such setting; it has none
optimizer.weightdecay=1 → optimizer.weightdecay: there is no such setting; did you mean weight_decay?
tracking.modes=x → tracking.modes: there is no such setting; did you mean mode?
trainer.max_epoch=1 → trainer.max_epoch: there is no such setting; did you mean max_epochs?
trainer.logger=true → trainer.logger is set by clplatform itself: leave it out
backbone.input=1 → backbone.input is set by clplatform itself: leave it out
strategy.replay.capactiy=3 → strategy.replay.capactiy: there is no such setting; did you mean capacity?
checkpoint.every_minuts=3 → checkpoint.every_minuts: there is no such setting; did you mean every_minutes?
""")


@pytest.mark.parametrize(("setting", "message"), ADDED)
def test_an_unknown_setting_that_a_plus_adds_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ClplatformError) as error:
        check(configuration(setting))
    assert str(error.value) == message


MISSING = lines("""
~seed → seed is missing: set it with seed=<value>
~checkpoint.every_minutes → checkpoint.every_minutes is missing: set it with checkpoint.every_minutes=<value>
~strategy.replay.capacity → strategy.replay.capacity is missing: set it with strategy.replay.capacity=<value>
~trainer → trainer=null: leave it at trainer=default
~trainer.max_epochs → trainer.max_epochs=null: input should be a valid integer
~stream → stream=null: choose one of those that `clplatform list` shows
~optimizer → optimizer=null: choose one of those that `clplatform list` shows
~strategy → strategy: none is chosen; plain fine-tuning is strategy=finetuning
~strategy.replay → strategy: none is chosen; plain fine-tuning is strategy=finetuning
strategy=[] → strategy: none is chosen; plain fine-tuning is strategy=finetuning
stream=text_files → stream.train is missing: set it with stream.train=<value>
stream=hf_text → stream.dataset is missing: set it with stream.dataset=<value>
strategy.replay=3 → strategy.replay=3: replay has settings, strategy.replay.<setting>=<value>; ~strategy.replay takes it
    out
""")


@pytest.mark.parametrize(("settings", "message"), MISSING)
def test_a_missing_setting_is_refused(settings: str, message: str, capsys: Capture) -> None:
    assert refused(capsys, "backbone=mlp", *settings.split()) == message


TARGETS = lines("""
stream._target_=clplatform.stream.images.split_image → stream._target_=clplatform.stream.images.split_image
strategy.replay._target_=my.Replay → strategy.replay._target_=my.Replay
optimizer._target_=torch.optim.AdmaW → optimizer._target_=torch.optim.AdmaW
""")


@pytest.mark.parametrize(("settings", "target"), TARGETS)
def test_an_unknown_target_is_refused(settings: str, target: str, capsys: Capture) -> None:
    assert refused(capsys, "backbone=mlp", settings) == (
        f"{target}: there is no such class or function; give its full dotted name (is its folder on PYTHONPATH?)"
    )


# -- values ----------------------------------------------------------------------------------------------------------

VALUES = lines("""
batch_size=0 → input should be greater than or equal to 1
stream.n_experiences=abc → input should be a valid integer
strategy.replay.capacity=-5 → input should be greater than or equal to 1
strategy=ewc strategy.ewc.strength=abc → input should be a valid number
strategy=[replay,ewc] ++strategy.ewc.strength=abc → input should be a valid number
trainer.max_epochs=0 → input should be greater than or equal to 1
+trainer.limit_train_batches=0 → input should be greater than 0
""")


@pytest.mark.parametrize(("settings", "reason"), VALUES)
def test_an_impossible_value_is_refused(settings: str, reason: str, capsys: Capture) -> None:
    last = settings.split()[-1].lstrip("+")
    assert refused(capsys, "backbone=mlp", *settings.split()) == f"{last}: {reason}"


CHECKED = lines("""
seed=abc → input should be a valid integer
seed=1.5 → input should be a valid integer
seed=null → input should be a valid integer
seed=-1 → input should be greater than or equal to 0
eval_batch_size=0 → input should be greater than or equal to 1
num_workers=-1 → input should be greater than or equal to 0
threads=0 → input should be greater than or equal to 1
label_smoothing=2 → input should be less than or equal to 1
early_stopping=0 → input should be greater than or equal to 1
name=null → input should be a valid string
checkpoint=null → input should be a group of settings
checkpoint.every_n_batches=0 → input should be greater than or equal to 1
checkpoint.every_minutes=0 → input should be greater than 0
stream.validation_fraction=1 → input should be less than 1
stream.scenario=classincremental → input should be 'class_incremental', 'task_incremental' or 'domain_incremental'
backbone.hidden=[400, -1] → item 2: input should be greater than or equal to 1
strategy.replay.capacity=2.5 → input should be a valid integer
strategy.replay.update=bach → input should be 'experience' or 'batch'
strategy.replay.batch_size=0 → input should be greater than or equal to 1
optimizer.lr=abc → input should be a valid number
optimizer.lr=.inf → input should be a finite number
optimizer.betas=[0.9] → item 2 is missing
scheduler.warmup=2 → input should be less than or equal to 1
trainer.max_epochs=-1 → input should be greater than or equal to 1
trainer.max_epochs=null → input should be a valid integer
trainer.accumulate_grad_batches=0 → input should be greater than or equal to 1
trainer.gradient_clip_val=-1 → input should be greater than or equal to 0
trainer.max_steps=0 → input should be -1; or input should be greater than or equal to 1
""")


@functools.cache
def composed() -> str:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return yaml.safe_dump(resolved(compose("run", ["backbone=mlp"])))


def configuration(setting: str) -> dict[str, Any]:
    """The default configuration with one setting, whether it is known or not."""
    config = yaml.safe_load(composed())
    check(config)
    path, _, value = setting.partition("=")
    *groups, key = path.split(".")
    functools.reduce(lambda node, group: node[group], groups, config)[key] = yaml.safe_load(value)
    return config


@pytest.mark.parametrize(("setting", "reason"), CHECKED)
def test_an_impossible_value_is_found(setting: str, reason: str) -> None:
    with pytest.raises(ClplatformError) as error:
        check(configuration(setting))
    assert str(error.value) == f"{setting.replace('.inf', 'inf')}: {reason}"


def test_a_page_that_is_not_nested_under_its_name_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine" / "strategy").mkdir(parents=True)
    (tmp_path / "mine" / "strategy" / "flat.yaml").write_text("_target_: my.Strategy\nstrength: 1.0\n")
    assert refused(capsys, "--config-dir", "mine", "backbone=mlp", "strategy=flat") == (
        "strategy._target_=my.Strategy: the page of a strategy has one key, the strategy's name, and under it _target_ "
        "and the settings"
    )


# -- ghosts and identity ----------------------------------------------------------------------------------------------


def test_ghosts_of_other_jobs_are_dropped_and_typos_are_not() -> None:
    replay = {"_target_": "clplatform.strategy.replay.Replay"}
    config: dict[str, Any] = {"strategy": {"ewc": {"strength": 3}, "replay": replay, "ewcc": {"strength": 3}, "lwf": 3}}
    notices = drop_ghosts(config, {"ewc", "replay", "lwf"}, ["seed=1", "+strategy.ewc.strength=3"])
    assert notices == ["strategy.ewc is set but ewc is not among the strategies of this job: ignored"]
    assert config["strategy"] == {"replay": replay, "ewcc": {"strength": 3}, "lwf": 3}
    assert drop_ghosts({"strategy": None}, {"ewc"}, []) == []
    config = {"strategy": {"ewc": {"strength": 3}, "replay": replay}}  # set by a recipe, for those who choose EWC
    assert drop_ghosts(config, {"ewc", "replay"}, ["strategy=replay", "strategy.ewc_like.strength=3"]) == []
    assert config["strategy"] == {"replay": replay}


NODES: dict[str, Any] = {"a": {"_target_": "x.A", "k": 1}, "b": {"_target_": "x.B"}}


def test_settings_that_came_later_change_nothing_where_they_are_null() -> None:
    """A sweep of before finds its runs, and their models are loaded."""
    page = yaml.safe_load((conf_dir() / "strategy" / "o_lora.yaml").read_text())["o_lora"]
    before = {k: v for k, v in page.items() if k != "lr"}
    stream = {"_target_": "x.text_to_text"}
    old, new = (
        {"strategy": {"o_lora": before}, "stream": stream},
        {"strategy": {"o_lora": page}, "stream": stream | {"metric_key": None}},
    )
    assert page["lr"] is None and identity(old) == identity(new)
    assert identity(new) != identity({**new, "strategy": {"o_lora": page | {"lr": 0.001}}})
    assert build_strategy("o_lora", before).lr is None  # type: ignore[attr-defined]


def test_what_cannot_change_the_numbers_does_not_change_the_identity() -> None:
    config: dict[str, Any] = {"seed": 0, "strategy": NODES, "tracking": "local", "name": "a", "num_workers": 0}
    config["checkpoint"] = {"every_minutes": 5.0}
    same = {**config, "tracking": "wandb", "name": "b", "num_workers": 4, "checkpoint": {"every_minutes": None}}
    ghost = {**config, "strategy": {"c": {"k": 2}, **NODES}}
    assert identity(config) == identity(same) == identity(ghost) == identity(dict(reversed(config.items())))


def test_a_run_that_only_measures_what_all_do_is_the_job_that_it_was() -> None:
    config: dict[str, Any] = {"seed": 0, "strategy": NODES}
    off = {"evaluate_every": None, "evaluate_samples": 100, "keep_models": False}
    assert identity({**config, **off}) == identity(config)
    asked = [{**off, "evaluate_every": 5}, {**off, "keep_models": True}]
    assert len({identity({**config, **values}) for values in [off, *asked]}) == 3  # so that a sweep makes them


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"strategy": {"a": {"_target_": "x.A", "k": 2}, "b": NODES["b"]}},
        {"strategy": {"b": NODES["b"], "a": NODES["a"]}},  # strategies act in the order typed
        {"batch_size": 8},
    ],
)
def test_what_can_change_the_numbers_changes_the_identity(change: dict[str, Any]) -> None:
    config = {"seed": 0, "strategy": NODES}
    assert identity(config) != identity({**config, **change})


def test_a_folder_of_a_sweep_is_named_after_the_resolved_configuration() -> None:
    def folder(**values: Any) -> str:
        config = OmegaConf.create({"lr": "${base}", "base": 1, "hydra": {"dir": "${config_hash:}"}, **values})
        assert identity(resolved(config)) == config.hydra.dir
        return config.hydra.dir

    assert folder() == folder(lr=1)  # whether it was typed or came by an interpolation
    assert folder() != folder(base=2)
