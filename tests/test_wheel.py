"""The wheel: what is in it, and that an installation composes, lists and runs what the checkout does, by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
UV = shutil.which("uv")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (REPOSITORY / "pyproject.toml").is_file(), reason="not in a checkout"),
    pytest.mark.skipif(UV is None, reason="uv is not installed"),
]


@dataclass
class Installation:
    """An environment that has the wheel, and by a path the packages of this one, but not the checkout."""

    wheel: Path
    folder: Path

    @property
    def conf(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages/clplatform/conf")
        return found

    def run(self, *command: str) -> str:
        """What a command of the environment prints, in the current folder."""
        return run([str(self.folder / "bin" / command[0]), *command[1:]])


def run(command: list[str], cwd: Path | None = None) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CLPLATFORM_", "HYDRA_", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    assert UV is not None
    folder = tmp_path_factory.mktemp("wheel")
    run([UV, "build", "--wheel", "--out-dir", str(folder / "dist"), str(REPOSITORY)])
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run([UV, "pip", "install", "--python", str(python), "--no-deps", "--offline", str(wheel)])
    # A path in a .pth file is not searched for more of them: the checkout, which is installed here by one, stays out.
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    (own / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    return Installation(wheel, folder / "venv")


def files(folder: Path, pattern: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob(pattern) if p.is_file()}


def test_the_wheel_holds_the_package_and_its_pages_and_nothing_else(installed: Installation) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        content = {name: wheel.read(name) for name in names}
    source = files(REPOSITORY / "clplatform", "*")
    package = {f"clplatform/{name}" for name in source if "__pycache__" not in name}
    pages = {f"clplatform/conf/{name}" for name in files(REPOSITORY / "conf", "*.yaml")}
    assert len(pages) > 50 and {"clplatform/conf/run.yaml", "clplatform/conf/strategy/replay.yaml"} <= pages
    assert names == package | pages
    for page in pages:
        assert content[page] == (REPOSITORY / page.removeprefix("clplatform/")).read_bytes(), page
    assert {"clplatform/report/template/report.html.jinja", "clplatform/report/template/report.css"} <= names


def test_the_checkout_is_out_of_sight(installed: Installation) -> None:
    code = (
        "import clplatform, clplatform.config as c, sys; print(clplatform.__file__, c.conf_dir(), *sys.path, sep='\\n')"
    )
    file, conf, *paths = installed.run("python", "-c", code).splitlines()
    assert Path(file).is_relative_to(installed.folder)
    assert Path(conf) == installed.conf
    assert not [
        p for p in paths if p and Path(p).resolve() in (REPOSITORY, REPOSITORY / "clplatform", REPOSITORY / "conf")
    ]


def test_it_composes_and_lists_what_the_checkout_does(installed: Installation) -> None:
    checkout = [sys.executable, "-m", "clplatform.cli"]
    for arguments in (
        ["--cfg", "job"],
        ["strategy=[replay,lwf]", "stream=clinc150", "--cfg", "job"],
        ["list"],
        ["--version"],
    ):
        printed = installed.run("clplatform", *arguments)
        assert printed and printed == run([*checkout, *arguments])
    listed = installed.run("clplatform", "list", "strategies")
    assert all(page.stem in listed for page in (REPOSITORY / "conf" / "strategy").glob("*.yaml"))


def test_its_own_pages_are_used(installed: Installation) -> None:
    """What is changed in them is seen, and only by it."""
    page = installed.conf / "run.yaml"
    before = page.read_text()
    assert "\nbatch_size: 32\n" in before
    try:
        page.write_text(before.replace("\nbatch_size: 32\n", "\nbatch_size: 31\n"))
        assert "\nbatch_size: 31\n" in installed.run("clplatform", "--cfg", "job")
        assert "\nbatch_size: 32\n" in run([sys.executable, "-m", "clplatform.cli", "--cfg", "job"])
    finally:
        page.write_text(before)


def test_the_quickstart_runs_and_predicts(installed: Installation, tmp_path: Path) -> None:
    """One batch of every experience of the quickstart, in a folder of its own."""
    printed = installed.run(
        "clplatform",
        "+trainer.limit_train_batches=1",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        "tracking=local",
    )
    (results,) = tmp_path.glob("outputs/**/results.json")
    run_dir = results.parent
    record = json.loads(results.read_text())
    assert record["status"] == "completed" and len(record["matrix"]) == 6 and record["strategy"] == ["replay"]
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert str(run_dir.relative_to(tmp_path) / "report.html") in printed
    from PIL import Image

    Image.new("L", (8, 8), 200).save("digit.png")
    (prediction,) = map(json.loads, installed.run("clplatform", "predict", str(run_dir), "digit.png").splitlines())
    assert prediction["label"] in set("0123456789") and 0 < prediction["probability"] <= 1
    assert files(tmp_path, "*.yaml") and not list(tmp_path.glob("conf"))
