from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clplatform.tracking import environment as module
from clplatform.tracking.environment import code_state, command_line, environment


def test_environment_is_json_and_says_what_it_ran_on() -> None:
    found = environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"time", "python", "platform", "cpu", "threads", "gpus", "packages", "code", "command"} <= set(found)
    assert found["cpu"]["count"] >= 1 and found["cpu"]["model"] and found["threads"] == torch.get_num_threads()
    assert {"torch", "pytorch-lightning", "transformers", "avalanche-lib", "hydra-core", "wandb"} <= set(
        found["packages"]
    )


def test_threads_and_gpus_only_where_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    found = environment()
    assert "threads" not in found and "torch" not in sys.modules and "torch" in found["packages"]


def test_environment_names_no_user_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [f"{Path.home()}/bin/clplatform", f"stream.data_dir={Path.home()}/data"])
    monkeypatch.setenv("SOME_VARIABLE", "value of some variable")
    text = json.dumps(environment())
    assert f"{Path.home()}/" not in text and "value of some variable" not in text
    assert json.loads(text)["command"] == ["clplatform", "stream.data_dir=~/data"]
    if getpass.getuser() != "root":
        assert f"/{getpass.getuser()}/" not in text


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("tracking.api_key=abc", "tracking.api_key=<redacted>"),
        ("+hub.token=hf_abc", "+hub.token=<redacted>"),
        ("x.PASSWORD=1", "x.PASSWORD=<redacted>"),
        ("--secret=1", "--secret=<redacted>"),
        ("a=0123456789abcdef0123456789abcdef01234567", "a=<redacted>"),
        ("url=https://me:pass@host/x", "url=https://me:<redacted>@host/x"),
        ("seed=3", "seed=3"),
        ("WANDB_API_KEY=1", "WANDB_API_KEY=<redacted>"),
        ("++a.key=x,y", "++a.key=<redacted>"),
        ("hub={token:abc,name:x}", "hub={token:<redacted>,name:x}"),
        ("+x={'api_key': 'v', b: 2}", "+x={'api_key': <redacted>, b: 2}"),
        ("url=https://host/x?token=abc&y=1", "url=https://host/x?token=<redacted>&y=1"),
        ("stream.max_tokens=128", "stream.max_tokens=128"),
        ("backbone.tokenizer=bert", "backbone.tokenizer=bert"),
        ("monkey=3", "monkey=3"),
        ("strategy=[replay,lwf]", "strategy=[replay,lwf]"),
        ("backbone.tokenizer.name=bert", "backbone.tokenizer.name=bert"),
    ],
)
def test_secrets_are_not_kept(word: str, shown: str) -> None:
    assert command_line(["clplatform", word]) == ["clplatform", shown]


def test_a_secret_in_the_next_word_is_not_kept() -> None:
    assert command_line(["clplatform", "--api-key", "abc", "seed=1"]) == [
        "clplatform",
        "--api-key",
        "<redacted>",
        "seed=1",
    ]
    assert command_line([]) == []


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_state_of_a_checkout_and_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "clplatform" / "tracking" / "environment.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(module, "__file__", str(source))
    state = code_state()
    assert state["version"] and state["git_commit"] is None and state["dirty"] is None
    git(tmp_path, "init")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "something-else"\n')
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "the package copied into another project")
    assert code_state()["git_commit"] is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "clplatform"\n')
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    state = code_state()
    assert len(state["git_commit"]) == 40 and state["dirty"] is False
    source.write_text("changed")
    assert code_state()["dirty"] is True
