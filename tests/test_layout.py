"""What the folders promise: pages, sources and tests belong together, and imports point where they should."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from strategies import NAMES
from world import make_experiment

import clplatform
from clplatform.config import ADDED, EXTRA, GIVEN, conf_dir
from clplatform.listing import strategy_facts
from clplatform.signature import OURS
from clplatform.strategy.base import Strategy
from clplatform.strategy.finetuning import Finetuning

SOURCE = Path(clplatform.__file__).parent
TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
PAGES = sorted(conf_dir().glob("*/*.yaml"))


def stems(folder: Path, pattern: str, but: set[str]) -> set[str]:
    return {path.stem.removeprefix("test_") for path in folder.glob(pattern)} - but


def source_of(name: str) -> str:
    """The file that a strategy's page builds from: its own, or that of the method it is a special case of."""
    target = yaml.safe_load((conf_dir() / "strategy" / f"{name}.yaml").read_text())[name]["_target_"]
    package, _, source = target.rpartition(".")[0].rpartition(".")
    assert package == "clplatform.strategy"
    return source


# -- pages, sources, tests ------------------------------------------------------------------------------------------


def test_every_strategy_has_a_page_a_source_and_a_test() -> None:
    sources = stems(SOURCE / "strategy", "*.py", {"__init__", "base"})
    assert len(sources) >= 8
    assert sources == {source_of(name) for name in NAMES} <= set(NAMES)
    assert stems(TESTS / "strategy", "test_*.py", {"base"}) == sources


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_s_page_is_nested_under_its_name_and_names_its_source(name: str) -> None:
    page = yaml.safe_load((conf_dir() / "strategy" / f"{name}.yaml").read_text())
    assert list(page) == [name]
    assert issubclass(get_object(page[name]["_target_"]), Strategy)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_page_starts_with_what_it_is(path: Path) -> None:
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @"))
    assert re.match(r"# \S.{9,}", first)


def nodes() -> Iterator[Any]:
    """Every page that builds something of ours, with its group."""
    for path in PAGES:
        group, page = path.parent.name, yaml.safe_load(path.read_text())
        node = page[path.stem] if group == "strategy" else page
        if node.get("_target_", "").startswith("clplatform."):
            yield pytest.param(group, node, id=f"{group}/{path.stem}")


@pytest.mark.filterwarnings("ignore")  # of libraries that a target imports
@pytest.mark.parametrize(("group", "node"), list(nodes()))
def test_a_page_has_every_argument(group: str, node: dict[str, Any]) -> None:
    """A page's keys are its target's signature, but for what the platform passes or keeps for itself."""
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    assert set(node) - OURS - EXTRA.get(group, set()) == set(parameters) - GIVEN.get(group, set())
    for name in set(parameters) - GIVEN.get(group, set()):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        if group != "stream":  # which people also build in Python
            later = name in ADDED.get(node["_target_"].split(".")[-2], ())  # saved models may not have it
            default = None if later else inspect.Parameter.empty
            assert parameters[name].default is default, f"{name}: numbers live in the page only"


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_says_where_it_comes_from_and_what_it_computes(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((SOURCE / "strategy" / f"{source_of(name)}.py").read_text())) or ""
    paper = strategy_facts(conf_dir() / "strategy" / f"{name}.yaml")["paper"]
    assert re.search(r"[A-Z]\w+.* (19|20)\d\d", paper), "a paper with its year in the first paragraph"
    assert re.search(r"^    \S.* = .+", docstring, re.MULTILINE), "a formula, indented"
    assert "cost" in docstring.lower()


# -- imports --------------------------------------------------------------------------------------------------------


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it, relative ones too."""
    found = set()
    package = ["clplatform", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) + "." if node.level else ""
            module = f"{base}{node.module or ''}".rstrip(".")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def importers(library: str) -> set[str]:
    """Files of ours that import a library, relative to the package."""
    return {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if any(module.split(".")[0] == library for module in imports(path))
    }


def test_one_door_to_avalanche() -> None:
    found = importers("avalanche")
    assert {"stream/avalanche.py", "avalanche_host/facade.py"} <= found
    assert all(path == "stream/avalanche.py" or path.startswith("avalanche_host/") for path in found)


def test_hydra_stays_with_the_configuration() -> None:
    assert importers("hydra") <= {"cli.py", "config.py", "compose.py", "build.py", "commands.py"}
    assert "compose.py" in importers("hydra")  # it does see them


@pytest.mark.parametrize("name", NAMES)
def test_strategies_import_no_other_strategy(name: str) -> None:
    own = source_of(name)
    others = {f"clplatform.strategy.{other}" for other in {*NAMES} - {own}}
    assert not others & imports(SOURCE / "strategy" / f"{own}.py")


@pytest.mark.skipif(not (REPOSITORY / "pyproject.toml").is_file(), reason="not in a checkout")
def test_the_import_contracts_of_pyproject_hold() -> None:
    import importlinter.cli  # noqa: F401  configures it
    from importlinter.application import use_cases

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        kept = use_cases.lint_imports(
            config_filename=str(REPOSITORY / "pyproject.toml"),
            limit_to_contracts=(),
            cache_dir=None,
            is_debug_mode=True,
            show_timings=False,
            no_logo=True,
            verbose=False,
        )
    assert kept, output.getvalue()


WITHOUT_TORCH = """
import sys
from clplatform.cli import main

for arguments in (["--help"], ["--version"], ["list"], ["report", sys.argv[1]], ["report", sys.argv[1], sys.argv[2]]):
    assert main(arguments) == 0, arguments
    heavy = {"torch", "transformers", "pytorch_lightning", "avalanche", "wandb"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


def test_help_list_and_report_import_no_torch(tmp_path: Path) -> None:
    for run in ("a", "b"):
        make_experiment(tmp_path / run, {"finetuning": Finetuning()}).run()
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "report.html").is_file()
    assert (tmp_path / "comparison.html").is_file()
