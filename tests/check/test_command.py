"""`clplatform check`: strategies of ours and of others, what is broken and what cannot be checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import call, refused

from clplatform.check import command
from clplatform.check.checks import CHECKS, cost, declares, memory


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves are tested elsewhere."""
    monkeypatch.setattr(command, "CHECKS", [declares, cost, memory])


def page(folder: Path, name: str, text: str) -> str:
    (folder / "strategy").mkdir(parents=True, exist_ok=True)
    (folder / "strategy" / f"{name}.yaml").write_text(f"# One of mine\n{name}:\n{text}")
    return str(folder)


def test_a_strategy_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "check", "strategy=l2_anchor", "strategy.l2_anchor.strength=3")
    assert done.code == 0, done.err
    assert "✓ declares" in done.out
    assert "– memory" in done.out  # it has none
    assert "2 kept, 0 broken, 1 do not apply" in done.out
    assert [*Path.cwd().iterdir()] == []


def test_a_chain(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "check", "strategy=[replay,lwf]")
    assert done.code == 0, done.err
    assert "strategy=[replay,lwf]" in done.out
    assert "✓ memory" in done.out


def test_somebody_s_own_with_what_is_broken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = page(tmp_path / "mine", "mine", "  _target_: planted.ForgetsItsCost\n")
    done = call(capsys, "check", "--config-dir", folder, "strategy=mine")
    assert done.code == 1
    assert "✗ cost" in done.out
    assert "cost() says extra_parameters=0, but" in " ".join(done.out.split())
    assert "1 kept, 1 broken, 1 do not apply" in done.out


def test_an_error_is_a_broken_promise_and_can_be_traced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(subject: object) -> None:
        """It does not fail."""
        raise RuntimeError("as planned")

    monkeypatch.setattr(command, "CHECKS", [fails])
    done = call(capsys, "check", "strategy=finetuning")
    assert done.code == 1
    assert "RuntimeError: as planned (" in done.out
    assert "Traceback" not in done.out
    assert "Traceback" in call(capsys, "check", "strategy=finetuning", "--traceback").out


def test_memories_are_made_small_unless_set() -> None:
    node = {"replay": {"_target_": "x", "capacity": 200}}
    assert command.small(node, ["strategy=replay"])["replay"]["capacity"] == 20
    assert command.small(node, ["strategy=replay", "strategy.replay.capacity=200"])["replay"]["capacity"] == 200


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["seed=3", "strategy=ewc"],
            "check seed=3: the world of the check is fixed; only strategy=… and strategy.… fit",
        ),
        (["strategy.ewc.strength=3"], "check: say which strategy, as in `clplatform check strategy=ewc`"),
        (["strategy=ewx"], "did you mean ewc?"),
        (["strategy=ewc", "strategy.ewc.strength=-1"], "strategy.ewc.strength=-1"),
        (["strategy=[joint,cumulative]"], "each adds all earlier data"),
        ([], "see `clplatform check --help`"),
    ],
)
def test_what_cannot_be_checked(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, "check", *arguments)


def test_every_check_says_what_is_promised() -> None:
    assert len(CHECKS) >= 20
    assert all((check.__doc__ or "").endswith(".") for check in CHECKS)
