"""What Hydra refuses, in our words."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import refused

from clplatform.explain import explain, pages

Capture = pytest.CaptureFixture[str]

PAGES = [
    ("stream", "split_digit", "split_digits"),
    ("backbone", "mpl", "mlp"),
    ("head", "multy", "multi"),
    ("strategy", "rplay", "replay"),
    ("optimizer", "adam", "adamw"),
    ("scheduler", "cosin", "cosine"),
    ("trainer", "defaul", "default"),
    ("tracking", "wandbb", "wandb"),
    ("experiment", "split_mnist", "split_mnist_mlp"),
]


@pytest.mark.parametrize(("group", "wrong", "right"), PAGES)
def test_a_misspelt_page(group: str, wrong: str, right: str, capsys: Capture) -> None:
    assert refused(capsys, f"{group}={wrong}") == f"{group}={wrong}: there is no such {group}; did you mean {right}?"


def test_a_misspelt_page_in_a_list_or_a_sweep(capsys: Capture) -> None:
    message = "strategy=rplay: there is no such strategy; did you mean replay?"
    assert refused(capsys, "strategy=[ewc,rplay]") == message
    assert refused(capsys, "-m", "strategy=ewc,rplay") == message  # before the first job


def test_a_page_that_is_like_no_other(capsys: Capture) -> None:
    assert refused(capsys, "optimizer=zzz") == "optimizer=zzz: there is no such optimizer; there is: adamw, sgd"
    assert refused(capsys, "optimizer=") == "optimizer=: there is no such optimizer; there is: adamw, sgd"


def test_a_group_is_chosen_by_a_name(capsys: Capture) -> None:
    assert refused(capsys, "strategy=null") == (
        "strategy=null: choose a page of strategy by its name; plain fine-tuning is strategy=finetuning"
    )
    for setting in ("backbone=null", "optimizer=3", "tracking=0.5", "scheduler=true"):
        group = setting.partition("=")[0]
        message = f"{setting}: choose a page of {group} by its name; see `clplatform list` for {group}"
        assert refused(capsys, "strategy=[replay,ewc]", setting) == message


NOT_CHOSEN = "the strategy ewc is not chosen; add strategy=ewc, or strategy=[replay,ewc] for several"


def test_a_setting_of_a_strategy_that_is_not_chosen(capsys: Capture) -> None:
    assert refused(capsys, "strategy.ewc.strength=3") == f"strategy.ewc.strength=3: {NOT_CHOSEN}"
    assert refused(capsys, "-m", "strategy=replay,lwf", "strategy.ewc.strength=3") == (
        f"strategy.ewc.strength=3: {NOT_CHOSEN}"
    )


@pytest.mark.parametrize(
    "setting", ["seed=0,1", "strategy=[replay],[ewc]", "optimizer.lr=choice(0.1,1)", "seed=range(3)"]
)
def test_several_values_need_a_sweep(setting: str, capsys: Capture) -> None:
    assert refused(capsys, setting) == f"{setting}: several values are a sweep, which needs -m"


def test_several_strategies_without_a_sweep(capsys: Capture) -> None:
    assert refused(capsys, "strategy=replay,ewc") == (
        "strategy=replay,ewc: several values are a sweep, which needs -m; to use them together write strategy=[replay,ewc]"
    )


@pytest.mark.parametrize(
    ("typed", "setting"),
    [
        ("+experiment=split_mnist_mlp", "experiment"),
        ("+stream=split_digits", "stream"),
        ("++backbone=mlp", "backbone"),
        ("+trainer.accelerator=cpu", "trainer.accelerator"),
    ],
)
def test_what_is_there_is_not_added(typed: str, setting: str, capsys: Capture) -> None:
    assert refused(capsys, typed) == f"{typed}: {setting} is there already; write it without +"


def test_a_second_strategy_is_not_added_with_a_plus(capsys: Capture) -> None:
    assert refused(capsys, "+strategy=ewc") == (
        "+strategy=ewc: strategy is there already; write it without +; several strategies are strategy=[a,b]"
    )


@pytest.mark.parametrize("setting", ["seed:3", "seed=[", "optimizer.lr=${backbone", 'name="a'])
def test_what_is_no_setting(setting: str, capsys: Capture) -> None:
    assert refused(capsys, setting) == f"{setting}: not of the form setting=value (quote it if the shell may change it)"


@pytest.mark.parametrize(
    ("reference", "reason"),
    [("${nowhere}", "Interpolation key 'nowhere' not found"), ("${f:1}", "Unsupported interpolation type f")],
)
def test_an_interpolation_that_leads_nowhere(reference: str, reason: str, capsys: Capture) -> None:
    """Whether a run reads it, or the name of the folder is made from it."""
    for arguments in (["backbone=mlp"], ["-m", "backbone=mlp"], ["name=x"]):
        setting = f"name={reference}" if arguments == ["name=x"] else f"optimizer.lr={reference}"
        assert refused(capsys, *arguments, setting) == f"{setting}: {reason}"


def test_what_is_to_be_taken_out_must_be_there(capsys: Capture) -> None:
    assert "'nothing'" in refused(capsys, "~nothing")
    assert "'optimizer.nothing'" in refused(capsys, "~optimizer.nothing")


def test_pages_of_one_s_own_are_known(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine" / "strategy").mkdir(parents=True)
    (tmp_path / "mine" / "strategy" / "halfway.yaml").write_text("halfway:\n  _target_: my.Halfway\n  share: 0.5\n")
    assert refused(capsys, "--config-dir=mine", "strategy=halfwya") == (
        "strategy=halfwya: there is no such strategy; did you mean halfway?"
    )
    assert refused(capsys, "--config-dir", "mine", "strategy=halfway", "strategy.halfway.shar=1") == (
        "strategy.halfway.shar=1: there is no such setting; did you mean share?"
    )
    assert refused(capsys, "--config-dir", "mine", "strategy.halfway.share=1").startswith(
        "strategy.halfway.share=1: the strategy halfway is not chosen"
    )
    assert refused(capsys, "--config-dir", "nowhere").endswith("nowhere' not found")
    assert pages("strategy", [Path("mine"), Path("nowhere")]) == {"halfway"}


def test_what_is_not_known_is_told_in_hydra_s_words_without_its_search_path() -> None:
    error = RuntimeError("Something else.\n\nConfig search path:\n  provider=hydra, path=pkg://hydra.conf")
    assert str(explain(error, [], [])) == "Something else."
